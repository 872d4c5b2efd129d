"""Bad input: one sentence that names the option, exit code 2, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from PIL import Image
from safetensors.torch import save_file

from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, erase, evaluate, merge_adapter
from esd_peft.adapters.save import ADAPTER
from esd_peft.errors import UserError
from esd_peft.evaluate import EVALUATION
from esd_peft.io import marks
from esd_peft.io.jobs import lock_output, only_job
from esd_peft.io.outputs import settle
from esd_peft.merge_adapter import MERGED
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig
from esd_peft.study.analyse import analyse_study
from esd_peft.study.make import make_study
from esd_peft.worlds import WORLDS
from runs import SHORTEST as QUICK
from train_shapes import train


def refused(says, output, job, *args, **options):
    with pytest.raises(UserError, match=says) as error:
        job(*args, **options)
    assert "\n" not in str(error.value)
    parent = output.parent
    assert not output.exists() or output.is_file() or (output / "mine").exists()
    assert not [p for p in parent.iterdir() if p.name.startswith(f".{output.name}")], "a draft was left behind"


def refused_erase(says, output, **options):
    refused(says, output, lambda: erase(EraseConfig(**({"concept": "circle", "output": output} | QUICK | options))))


@pytest.fixture
def broken(small_sd, tmp_path):
    """A copy of the small pipeline, to break."""
    return shutil.copytree(small_sd, tmp_path / "model")


@pytest.mark.parametrize(
    ("concept", "says"),
    [("zebra", "never seen 'zebra'"), ("a striped unicorn", "unicorn"), ("picture", "names nothing")],
)
def test_concepts_the_embedded_pipeline_does_not_know(tmp_path, concept, says):
    refused_erase(says, tmp_path / "out", concept=concept)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preserve": "a zebra"}, "--preserve 'a zebra'"),
        ({"preserve": "a red circle"}, "names what is to be erased"),
        ({"map_to": "zebra"}, "--map-to 'zebra'"),
        ({"erase_from": "square"}, "is the same as"),
        ({"map_to": "circle"}, "--map-to 'circle' names what is to be erased"),
        (
            {"concept": [{"name": "circle", "map_to": "a red shape"}, "red"], "trajectories": 2},
            "--map-to 'a red shape' names",
        ),
        ({"concept": "the"}, "--concept 'the'"),
        ({"adapter_type": "none"}, "--rank and --alpha"),
        ({"trajectories": 1, "concept": ["circle", "red"]}, "--trajectories"),
    ],
    ids=str,
)
def test_options_that_cannot_work(tmp_path, options, says):
    refused_erase(says, tmp_path / "out", **options)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_that_lacks_a_part(broken, tmp_path, part):
    shutil.rmtree(broken / part)
    refused_erase(f"lacks its {part}", tmp_path / "out", model=str(broken))


def test_models_that_are_not_there_or_of_another_family(broken, tmp_path):
    refused_erase("it is not there", tmp_path / "out", model=str(tmp_path / "nothing"))
    index = broken / "model_index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps(values | {"_class_name": "KandinskyPipeline"}))
    refused_erase("is a KandinskyPipeline", tmp_path / "out", model=str(broken))
    index.write_text("{")
    refused_erase("damaged", tmp_path / "out", model=str(broken))


def test_truncated_weights(broken, tmp_path):
    file = broken / "unet" / NAME
    file.write_bytes(file.read_bytes()[:-1000])
    refused_erase("unet cannot be loaded", tmp_path / "out", model=str(broken))


def test_pickled_weights_are_not_read(broken, tmp_path):
    (broken / "unet" / NAME).rename(broken / "unet" / "diffusion_pytorch_model.bin")
    refused_erase("unet", tmp_path / "out", model=str(broken))


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "mps", "gpu please"])
def test_devices_that_are_not_there(tmp_path, name):
    refused_erase("--device", tmp_path / "out", device=name)


def test_outputs_in_the_way(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    refused_erase("--overwrite", tmp_path / "out")
    (tmp_path / "file").write_text("precious")
    refused_erase("is a file", tmp_path / "file", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_outputs_that_would_replace_what_is_read(broken, tmp_path, monkeypatch):
    monkeypatch.chdir(broken)
    for output in (".", "..", tmp_path):
        with pytest.raises(UserError, match=r"--output .* is or holds"):
            erase(EraseConfig(concept="circle", output=output, overwrite=True, **QUICK))
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match=r"--output .* is or holds"):
        erase(EraseConfig(concept="circle", model=str(broken), output=broken, overwrite=True, **QUICK))
    assert (broken / "model_index.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="root may write everywhere")
def test_an_output_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="--output /proc/out cannot be written"):
        erase(EraseConfig(concept="circle", output="/proc/out", **QUICK))


@pytest.fixture(scope="module")
def adapter(small_sd, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapters") / "adapter"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=output, **QUICK))
    return output


def refused_merge(says, output, **options):
    refused(says, output, lambda: merge_adapter(MergeConfig(output=output, **options)))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def mine(adapter, small_sd, tmp_path):
    """An adapter that names its base, both in a folder with other things, and links to them."""
    (tmp_path / "models").mkdir()
    base = shutil.copytree(small_sd, tmp_path / "models" / "base")
    (tmp_path / "models" / "notes.txt").write_text("precious")
    copy = shutil.copytree(adapter, tmp_path / "erased")
    for name, key in (("base.json", '"model": '), ("config.yaml", "model: ")):
        text = (copy / name).read_text()
        (copy / name).write_text(
            text.replace(f"{key}{small_sd}", f"{key}{base}").replace(f'{key}"{small_sd}', f'{key}"{base}')
        )
    known = json.loads((copy / "base.json").read_text())
    del known["files"]  # their hashes, of which one has changed
    (copy / "base.json").write_text(json.dumps(known))
    (tmp_path / "link").symlink_to(base)
    for folder, made in ((base, MERGED), (tmp_path / "models", MERGED), (copy, ADAPTER)):
        marks.begin(folder, made)
        settle(folder)  # all of it as if this package had written it
    marks.add(tmp_path / "models", ["base/"])
    return tmp_path


@pytest.mark.parametrize("named", [True, False], ids=["--base", "base.json"])
@pytest.mark.parametrize("output", ["models/base", "link", "models", ".", "models/base/unet", "models/base/merged", "erased",
    "erased/merged", f"models/base/unet/{NAME}", "models/base/new.safetensors", "erased/adapter_model.safetensors",
    "erased/new.safetensors"])  # fmt: skip
def test_a_merge_replaces_nothing_that_it_reads(mine, output, named):
    before = contents(mine)
    assert str(mine / "models" / "base") in before[mine / "erased" / "base.json"].decode()
    base = {"base": str(mine / "models" / "base")} if named else {}
    with pytest.raises(UserError, match=r"--output .* (is or holds|lies in|holds config.json, which|was not written by) "):
        merge_adapter(MergeConfig(adapter=mine / "erased", output=mine / output, overwrite=True, **base))
    assert contents(mine) == before


def test_a_merge_replaces_nothing_of_somebody_else(mine, small_sd):
    shutil.copytree(small_sd, mine / "other")
    save_file({"a": torch.zeros(1)}, mine / "other.safetensors", {"format": "pt"})
    before = contents(mine)
    for name, says in (("other", "which esd_peft did not write"), ("other.safetensors", "was not written by this command")):
        with pytest.raises(UserError, match=says):
            merge_adapter(MergeConfig(adapter=mine / "erased", output=mine / name, overwrite=True))
    assert contents(mine) == before
    for name in ("merged", "merged.safetensors"):
        for _ in range(2):  # its own it replaces
            merge_adapter(MergeConfig(adapter=mine / "erased", output=mine / name, overwrite=True))
    (mine / "merged" / "unet" / "mine.safetensors").write_text("precious")
    with pytest.raises(UserError, match=r"holds unet/mine.safetensors, which esd_peft did not write"):
        merge_adapter(MergeConfig(adapter=mine / "erased", output=mine / "merged", overwrite=True))


@pytest.mark.parametrize("output", ["models/base", "models", "link/evaluation", "erased", "erased/other", "out", "out/real"])
def test_an_evaluation_replaces_nothing_that_it_reads(mine, output):
    (mine / "out" / "real").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(mine / "out" / "real" / "a.png")
    marks.begin(mine / "out", EVALUATION)
    before = contents(mine)
    options = {"attack": ["textual-inversion"], "attack_reference": mine / "out" / "real", "device": "cpu"}
    with pytest.raises(UserError, match=r"--output .* (is or holds|lies in) "):
        evaluate(EvaluateConfig(erased=mine / "erased", output=mine / output, overwrite=True, **options))
    assert contents(mine) == before


def test_an_evaluation_replaces_nothing_of_somebody_else(mine):
    (mine / "out").mkdir()
    (mine / "out" / "report.html").write_text("precious")
    with pytest.raises(UserError, match="holds files that esd_peft did not write"):
        evaluate(EvaluateConfig(erased=mine / "erased", output=mine / "out", overwrite=True, device="cpu"))
    marks.begin(mine / "out", EVALUATION)
    with pytest.raises(UserError, match=r"holds report.html, which esd_peft did not write"):
        evaluate(EvaluateConfig(erased=mine / "erased", output=mine / "out", overwrite=True, device="cpu"))
    assert (mine / "out" / "report.html").read_text() == "precious"


@pytest.mark.parametrize("name", ["out", "erased"])
def test_an_erasure_replaces_nothing_of_somebody_else(mine, name):
    (mine / "out").mkdir()
    (mine / name / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds notes.txt, which esd_peft did not write"):
        erase(EraseConfig(concept="circle", output=mine / name, overwrite=True, **QUICK))
    assert (mine / name / "notes.txt").read_text() == "precious"


def test_one_run_at_a_time_writes_an_output(mine):
    adapter, output = mine / "erased", mine / "out"
    options = {"output": output, "overwrite": True}
    jobs = [
        lambda: erase(EraseConfig(concept="circle", **QUICK, **options)),
        lambda: merge_adapter(MergeConfig(adapter=adapter, **options)),
        lambda: merge_adapter(MergeConfig(adapter=adapter, **options | {"output": mine / "out.safetensors"})),
        lambda: evaluate(EvaluateConfig(erased=adapter, device="cpu", **options)),
        lambda: make_study(MakeStudyConfig(condition=[mine / "models"], question="Q?", **options)),
        lambda: analyse_study(AnalyseStudyConfig(answers=[mine / "a.csv"], output=output)),
        lambda: train(output, ["tokenizer"], {}, 0),
    ]
    with lock_output(output), lock_output(mine / "out.safetensors"):
        for job in jobs:
            with pytest.raises(UserError, match=r"--output .*: another run is writing there"):
                job()
    assert not output.exists()


def test_one_thread_at_a_time(mine):
    jobs = [
        lambda: erase(EraseConfig(concept="circle", output=mine / "out", **QUICK)),
        lambda: merge_adapter(MergeConfig(adapter=mine / "erased", output=mine / "out")),
        lambda: evaluate(EvaluateConfig(erased=mine / "erased", output=mine / "out", device="cpu")),
    ]
    with only_job(), ThreadPoolExecutor(1) as pool:
        for job in jobs:
            with pytest.raises(UserError, match="another thread of this process is erasing, merging or evaluating"):
                pool.submit(job).result()
    assert not (mine / "out").exists()


def test_adapters_that_do_not_fit(adapter, tmp_path):
    embedded = EraseConfig(concept="circle").pretrained.model  # another architecture: the shapes pipeline
    assert embedded == "shapes"
    for base in (embedded, str(WORLDS[embedded].pipeline)):
        refused_merge("does not fit the base", tmp_path / "out", adapter=adapter, base=base)
    (tmp_path / "empty").mkdir()
    refused_merge("is not an adapter directory", tmp_path / "out", adapter=tmp_path / "empty")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "base.json", "config.yaml"])
def test_damaged_adapters(adapter, tmp_path, file):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    damaged = (copy / file).read_bytes()
    (copy / file).write_bytes(damaged[: len(damaged) // 2] if file.endswith("safetensors") else b"{[")
    refused_merge(file, tmp_path / "out", adapter=copy)


def test_truncated_base(adapter, broken, tmp_path):
    file = broken / "unet" / NAME
    file.write_bytes(file.read_bytes()[:-1000])
    refused_merge("safetensors", tmp_path / "out", adapter=adapter, base=str(broken))


def test_a_shard_outside_the_folder_is_refused(adapter, broken, tmp_path):
    (broken / "unet" / NAME).rename(tmp_path / NAME)
    index = {"weight_map": {"conv_in.weight": f"../../{NAME}"}}
    (broken / "unet" / f"{NAME}.index.json").write_text(json.dumps(index))
    refused_merge("shard", tmp_path / "out", adapter=adapter, base=str(broken))


def test_a_scope_that_selects_nothing_lists_those_that_do():
    from torch import nn

    from esd_peft.models import open_family

    layers = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(2, 2)})})
    with pytest.raises(UserError, match=r"esd-x selects nothing .* esd-u, selfattn, full"):
        open_family("shapes").scope_modules(layers, "esd-x")


def test_commands_exit_with_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "esd_peft.erase", "--concept", "zebra", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --concept 'zebra'") and done.stderr.count("\n") == 1
    assert not done.stdout and not list(tmp_path.iterdir())
