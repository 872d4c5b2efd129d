"""What a merged model gets of its base: the files that `from_pretrained` reads, and nothing else that lies there."""

import json
import shutil

import pytest
from diffusers import StableDiffusionPipeline
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.errors import UserError
from families import draw_small, save_family
from runs import SHORTEST

QUICK = SHORTEST | {"trajectories": 2, "max_train_steps": 2}
OTHERS = ["unet-Q8_0.gguf", f"{NAME}.bak", "onnx__MatMul_9107", "unet.engine", "unet.npz", "unet.pt2", "old.safetensors",
          "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors", "config.json.orig", ".hidden",
          "diffusion_pytorch_model.safetensors.index.fp16.json"]  # fmt: skip


@pytest.fixture(scope="module")
def adapter(small_sd, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapters") / "a"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=output, **QUICK))
    return output


@pytest.fixture
def model(small_sd, tmp_path):
    return shutil.copytree(small_sd, tmp_path / "model")


def merge(adapter, model, output):
    return merge_adapter(MergeConfig(adapter=adapter, base=str(model), output=output))


def names(path):
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_other_copies_of_the_weights_are_not_published(adapter, model, tmp_path):
    merge(adapter, model, tmp_path / "clean")
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "."):
        for name in OTHERS:
            shutil.copy(model / "unet" / NAME, model / part / name)
    (model / "unet" / "checkpoint-500").mkdir()
    shutil.copy(model / "unet" / NAME, model / "unet" / "checkpoint-500" / NAME)
    merge(adapter, model, tmp_path / "merged")
    assert names(tmp_path / "merged") == names(tmp_path / "clean")
    StableDiffusionPipeline.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("family", ["sd3", "flux dev", "sana", "sdxl", "z-image"])
def test_all_that_each_familys_pipeline_reads_is_there(family, tmp_path):
    """As saved by diffusers itself, with transformers' tokenizers: nothing of it is left behind."""
    model = save_family(family, tmp_path / "model")
    output = tmp_path / "a"

    with pytest.MonkeyPatch.context() as patch:
        draw_small(patch)
        erase(EraseConfig(concept="circle", model=str(model), output=output, **QUICK))
    merge(output, model, tmp_path / "merged")
    assert {*names(model)} <= {*names(tmp_path / "merged")}


@pytest.mark.parametrize("name", ["LICENSE", "model_index.json", "tokenizer/vocab.json", "scheduler/scheduler_config.json"])
def test_a_file_that_links_out_of_the_model_is_refused(adapter, model, tmp_path, name):
    (tmp_path / "secret").write_text((model / "model_index.json").read_text())
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=rf"{name.split('/')[-1]}"):
        merge(adapter, model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_links_to_one_file_do_not_multiply(adapter, model, tmp_path):
    file = model / "vae" / NAME
    shards = {f"x{i}": f"{i}.safetensors" for i in range(50)}
    file.rename(model / "vae" / "0.safetensors")
    for name in [*shards.values()][1:]:
        (model / "vae" / name).symlink_to("0.safetensors")
    (model / "vae" / f"{NAME}.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="names one file several times"):
        merge(adapter, model, tmp_path / "merged")


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "vae/config.json", "tokenizer/tokenizer.json"])
def test_json_that_is_none_is_not_published(adapter, model, tmp_path, name):
    (model / name).write_text('{"a": ')
    with pytest.raises(UserError, match=rf"{name.split('/')[1]} is damaged|cannot be loaded"):
        merge(adapter, model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_folders_that_hold_no_weights_or_no_licence_are_no_obstacle(adapter, model, tmp_path):
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "safety_checker").mkdir()
    (model / "safety_checker" / "config.json").write_text("{}")
    (model / "LICENSES").mkdir()
    (model / "LICENSES" / "MIT.txt").write_text("do as you like")
    merge(adapter, model, tmp_path / "merged")
    assert names(tmp_path / "merged" / "safety_checker") == ["config.json"]
    assert not (tmp_path / "merged" / "LICENSES").exists()
