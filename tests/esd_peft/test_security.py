"""Nothing is run that a model brings along, and nothing is told that is nobody's business.

Paths out of a directory are in `test_fuzz.py` and `test_model_source.py`, hostile texts in `evaluation/test_report.py`,
`study/test_page.py` and `test_model_card.py`.
"""

import contextlib
import csv
import io
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, CLIPModel

from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, erase, evaluate, merge_adapter
from esd_peft.adapters.export import write_checkpoint
from esd_peft.errors import UserError
from esd_peft.evaluation import suites
from esd_peft.evaluation.pretrained import load_pretrained
from esd_peft.models import open_family
from esd_peft.options.model import ModelOptions
from pipelines import small_stable_diffusion
from runs import SHORTEST

QUICK = SHORTEST | {"num_validation_images": 1}
TOKEN = "hf_" + "aB3" * 11


def whole_way(model, folder):
    """Erase, merge, evaluate."""
    erase(EraseConfig(concept="circle", model=str(model), output=folder / "erased", **QUICK))
    merge_adapter(MergeConfig(adapter=folder / "erased", output=folder / "merged"))
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], ["a circle"], ["a star"]])
    evaluate(
        EvaluateConfig(
            erased=folder / "merged",
            base=str(model),
            suite="csv",
            prompts=str(folder / "prompts.csv"),
            seeds=1,
            num_inference_steps=2,
            device="cpu",
            output=folder / "evaluation",
        )
    )


class Unpickled:
    """What is unpickled, as Python itself reports it, or by torch, which has an unpickler of its own."""

    names: list[str] | None = None

    def hook(self, event, values):
        if self.names is not None and event == "pickle.find_class":
            self.names.append(".".join(values))

    @contextlib.contextmanager
    def noted(self):
        self.names = names = []
        load = torch.load

        def loaded(*args, **options):
            names.append("torch.load")
            return load(*args, **options)

        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "load", loaded)
                yield names
        finally:
            self.names = None


UNPICKLED = Unpickled()
sys.addaudithook(UNPICKLED.hook)


def test_pickles_are_noted_where_they_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    model = small_stable_diffusion(tmp_path / "pickled", safe_serialization=False)
    with UNPICKLED.noted() as names, pytest.raises(UserError, match="--allow-pickle"):
        open_family(str(model)).load_denoiser(torch.float32)
    assert not names
    with UNPICKLED.noted() as names:
        open_family(str(model), options=ModelOptions(allow_pickle=True)).load_denoiser(torch.float32)
    assert names


def put_code(folder, ran):
    """Code that tells that it ran, under the names by which libraries look for a repository's own code."""
    for name in ("evil.py", "pipeline.py"):
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def ran(tmp_path):
    """The file that a model's own code would write."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def run(small_sd, tmp_path_factory):
    """Every command, on a model that brings code, with a token in the environment: folder, output, what was unpickled."""
    folder = tmp_path_factory.mktemp("run")
    model = shutil.copytree(small_sd, folder / "model")
    for place in (model, *(path for path in model.iterdir() if path.is_dir())):
        put_code(place, folder / "ran")
    auto = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
    edit(model / "tokenizer" / "tokenizer_config.json", auto_map=auto)
    for part in ("unet", "text_encoder"):
        edit(model / part / "config.json", auto_map=auto)
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        UNPICKLED.noted() as names,
    ):
        patch.setenv("HF_TOKEN", TOKEN)
        patch.chdir(model)  # where `import evil` would find it
        whole_way(model, folder)
    return folder, said.getvalue(), names


def test_no_pickle_is_read(run):
    assert not run[2]


def test_a_models_own_code_does_not_run(run):
    assert not (run[0] / "ran").exists()


def test_the_hubs_token_is_written_nowhere(run):
    folder, said, _ = run
    assert TOKEN not in said
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("value", [["evil", "Evil"], ["os", "system"], ["pipeline", "Evil"]])
def test_a_part_of_a_foreign_module_is_refused(small_sd, tmp_path, ran, value, monkeypatch):
    model = shutil.copytree(small_sd, tmp_path / "model")
    put_code(model, ran)
    edit(model / "model_index.json", unet=value)
    monkeypatch.chdir(model)
    monkeypatch.syspath_prepend(str(model))
    with pytest.raises(UserError, match="its unet is no class of diffusers or transformers"):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", **QUICK))


def test_a_pipeline_class_of_its_own_is_refused(small_sd, tmp_path, ran):
    model = shutil.copytree(small_sd, tmp_path / "model")
    put_code(model, ran)
    edit(model / "model_index.json", _class_name=["pipeline", "Evil"])
    with pytest.raises(UserError, match=r"model_index.json is damaged"):
        open_family(str(model))


HOSTILE = {
    "tokenizer": ("transformers", "AutoTokenizer", "tokenizer_config.json"),
    "text_encoder": ("transformers", "AutoModel", "config.json"),
    "unet": ("diffusers", "AutoModel", "config.json"),
    "vae": ("diffusers", "AutoModel", "config.json"),
    "scheduler": ("diffusers", "SchedulerMixin", "scheduler_config.json"),
}


@pytest.mark.parametrize("part", HOSTILE)
def test_the_code_of_no_part_runs(small_sd, tmp_path, ran, part, monkeypatch):
    """Classes that look the class up in the repository, with code there to be found, and nobody asked whether to run it."""
    library, kind, named = HOSTILE[part]
    model = shutil.copytree(small_sd, tmp_path / "model")
    put_code(model / part, ran)
    edit(model / "model_index.json", **{part: [library, kind]})
    auto = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(model / part / named, auto_map=auto, model_type="evil", tokenizer_class="Evil", _class_name="Evil")
    monkeypatch.chdir(model / part)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a person in a hurry would answer
    monkeypatch.setattr("signal.alarm", lambda *_: 0)
    with pytest.raises(UserError, match=rf"its .*{part}"):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", **QUICK))


@pytest.mark.parametrize("options", [{"allow_pickle": True}, {"checkpoint_config": "model"}])
def test_a_foreign_module_is_not_imported_by_a_conversion(small_sd, tmp_path, ran, options, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    model = shutil.copytree(small_sd, tmp_path / "model")
    write_checkpoint(tmp_path / "sd.safetensors", open_family(str(small_sd)), lambda name, weight: weight, {})
    put_code(tmp_path, ran)
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")
    edit(model / "model_index.json", scheduler=["evil", "Evil"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="its scheduler is no class of diffusers or transformers"):
        open_family("sd.safetensors" if "checkpoint_config" in options else str(model), options=ModelOptions(**options))


@pytest.mark.parametrize("kind", [AutoModel, AutoImageProcessor, AutoProcessor, CLIPModel], ids=lambda kind: kind.__name__)
def test_the_code_of_an_evaluations_models_does_not_run(tmp_path, ran, kind, monkeypatch):
    put_code(tmp_path, ran)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "evil.Evil")
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--clip .* cannot be loaded"):
        load_pretrained(kind, str(tmp_path), "--clip")


def test_a_detectors_own_code_does_not_run(tmp_path, ran):
    folder = tmp_path / "detector"
    folder.mkdir()
    put_code(folder, ran)
    auto = {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(UserError, match=r"--detector .* cannot be loaded"):
        load_pretrained(AutoModelForImageClassification, str(folder), "--detector")


@pytest.mark.parametrize(
    "settings", [{"peft_type": "PROMPT_TUNING"}, {"megatron_config": {"a": 1}, "megatron_core": "evil"}]
)
def test_an_adapter_that_would_load_more_is_refused(run, tmp_path, settings):
    shutil.copytree(run[0] / "erased", tmp_path / "adapter")
    whole = {"peft_type": "LORA", "r": 2, "target_modules": ["to_k"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(whole | settings))
    with pytest.raises(
        UserError, match=r"does not change weights alone, as LoRA does; name one that does|adapter_config.json is damaged"
    ):
        merge_adapter(MergeConfig(adapter=tmp_path / "adapter", output=tmp_path / "out"))


@pytest.mark.parametrize("known", [True, False])
def test_the_hubs_token_in_an_error_is_left_out(monkeypatch, known):
    secret = "s3cret-of-a-mirror" if known else TOKEN
    if known:
        monkeypatch.setenv("HF_TOKEN", secret)

    def download(*_, **__):
        raise ConnectionError(f"401 for https://user:{secret}@hub/x with Authorization: Bearer {secret}")

    monkeypatch.setattr(suites, "hf_hub_download", download)
    with pytest.raises(UserError, match=r"401 for https://user:\*\*\*@hub") as error:
        suites.read_prompts("owner/data/file.csv", suites.load_suite("csv"))
    assert secret not in str(error.value)
