"""The main job and the merge, on a small random pipeline: what is written, what loads where, and what it costs."""

import json
import os
import shutil
import stat

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.errors import UserError

QUICK = {"num_inference_steps": 4, "trajectories": 3, "max_train_steps": 4, "train_batch_size": 4, "rank": 2,
         "learning_rate": 1e-2, "preservation_ratio": 0.25, "device": "cpu", "num_validation_images": 0}  # fmt: skip


def run(model, output, **options):
    return erase(EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options)))


def inputs():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    return latents, torch.tensor([17, 800]), torch.randn(2, 16, 24, generator=generator)


def predict(unet):
    latents, timesteps, embeds = inputs()
    with torch.no_grad():
        return unet(latents, timesteps, embeds).sample


def load_unet(path):
    return UNet2DConditionModel.from_pretrained(path / "unet", dtype=torch.float32)


@pytest.fixture(scope="module")
def erased(small_sd, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "erased"
    return output, run(small_sd, output, num_validation_images=1, learning_rate=0.1)


def test_result_holds_costs_and_config(erased):
    output, result = erased
    assert json.loads((output / "result.json").read_text()) == result
    # 3 trajectories of 4 steps, two evaluations each, then 4 steps of 4 samples at 3 evaluations
    assert result["nfe"] == 3 * 4 * 2 + 4 * 4 * 3
    assert result["training_samples"] == 4 * 3  # the fourth sample of each batch holds the student to the teacher
    assert result["config"]["prompts"]["concept"] == ["circle"]
    assert set(result["seconds"]) == set(result["peak_memory_bytes"]) >= {"encode", "rollout", "train", "save"}
    assert all(v > 0 for v in result["peak_memory_bytes"].values())
    assert Image.open(output / "before_after.png").size[0] > 100
    assert result["concepts"] == result["others"] == {}  # no classifier knows this model


def test_the_config_beside_the_adapter_makes_the_same_adapter_again(erased, small_sd, tmp_path):
    output, _ = erased
    from esd_peft.options.command_line import parse

    config = parse(
        EraseConfig,
        "python -m esd_peft.erase",
        ["--config", str(output / "config.yaml"), "--output", str(tmp_path / "again")],
    )
    erase(config)
    first, again = (load_file(p / "adapter_model.safetensors") for p in (output, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_plain_diffusers_and_plain_peft_read_the_adapter(erased, small_sd):
    output, _ = erased
    by_peft = peft.PeftModel.from_pretrained(load_unet(small_sd), output)
    pipe = StableDiffusionPipeline.from_pretrained(small_sd, dtype=torch.float32)
    pipe.load_lora_weights(output)
    changed = predict(by_peft)
    torch.testing.assert_close(predict(pipe.unet), changed)
    assert (changed - predict(load_unet(small_sd))).abs().max() > 1e-3


def test_alpha_survives_into_diffusers(small_sd, tmp_path):
    run(small_sd, tmp_path / "erased", alpha=7.0)
    pipe = StableDiffusionPipeline.from_pretrained(small_sd, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "erased")
    by_peft = peft.PeftModel.from_pretrained(load_unet(small_sd), tmp_path / "erased")
    torch.testing.assert_close(predict(pipe.unet), predict(by_peft))


def test_merged_pipeline_makes_the_images_of_base_plus_adapter(erased, small_sd, tmp_path):
    output, _ = erased
    record = merge_adapter(MergeConfig(adapter=output, output=tmp_path / "merged"))
    assert record["concept"] == ["circle"] and record["base"]["trained_on_it"]
    assert record["verification"]["largest_difference"] < 0.1 * record["verification"]["adapter_changes"]
    images = []
    for path, lora in ((small_sd, output), (tmp_path / "merged", None)):
        pipe = StableDiffusionPipeline.from_pretrained(path, dtype=torch.float32)
        if lora:
            pipe.load_lora_weights(lora)
        noise = torch.Generator().manual_seed(1)
        images.append(pipe("a circle", num_inference_steps=5, generator=noise, output_type="pt").images)
    assert (images[0] - images[1]).abs().max() < 2 / 255  # the weights' rounding to fp16


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "esd-x-strict", "adapter_type": "loha"},
        {"scope": "full", "adapter_type": "lokr"},
        {"scope": "selfattn", "rollout": "student", "buffer_refresh_interval": 2, "optimizer": "AdamW8bit"},
        {"scope": "esd-u", "adapter_type": "none", "rank": None, "learning_rate": 1e-3, "optimizer": "PagedAdamW8bit"},
        {"scope": "esd-u", "gradient_checkpointing": True, "dtype": "bfloat16", "lr_scheduler": "cosine"},
        {"scope": "esd-x", "quantize": "nf4"},
        {"scope": "esd-x", "quantize": "int8"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_kind_of_student_trains_saves_and_merges(small_sd, tmp_path, options):
    result = run(small_sd, tmp_path / "erased", **options)
    assert result["trained_parameters"] > 0
    record = merge_adapter(MergeConfig(adapter=tmp_path / "erased", output=tmp_path / "merged"))
    assert record["verification"]["adapter_changes"] > 0
    change = predict(load_unet(tmp_path / "merged")) - predict(load_unet(small_sd))
    assert change.abs().max() > 1e-5


@pytest.mark.parametrize("driver", ["student", "teacher"])
def test_a_buffer_of_one_sample_costs_what_the_paper_costs(small_sd, tmp_path, driver):
    """R = 1 and batch 1: a trajectory to a random step, one teacher pair there, one training step."""
    options = {
        "rollout": driver,
        "buffer_refresh_interval": 1,
        "train_batch_size": 1,
        "max_train_steps": 6,
        "adapter_type": "none",
        "rank": None,
    }
    result = run(small_sd, tmp_path / "erased", **options, preservation_ratio=0, learning_rate=1e-4)
    assert result["training_samples"] == 6
    assert 6 * (2 + 3) <= result["nfe"] <= 6 * (2 * 4 + 3)


def test_only_the_scope_changes(small_sd, tmp_path):
    run(small_sd, tmp_path / "erased", scope="esd-x-strict")
    merge_adapter(MergeConfig(adapter=tmp_path / "erased", output=tmp_path / "merged"))
    file = "unet/diffusion_pytorch_model.safetensors"
    base, merged = load_file(small_sd / file), load_file(tmp_path / "merged" / file)
    assert {k: v.dtype for k, v in base.items()} == {k: v.dtype for k, v in merged.items()}
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name for name in base if "attn2.to_k" in name or "attn2.to_v" in name}


def test_sharded_bases_merge_and_other_variants_stay_behind(tmp_path):
    from pipelines import small_stable_diffusion

    base = small_stable_diffusion(tmp_path / "base", max_shard_size="300KB")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"still knows circles")
    (base / "v1-5-pruned.safetensors").write_bytes(b"so does this")
    assert (base / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    run(base, tmp_path / "erased")
    merge_adapter(MergeConfig(adapter=tmp_path / "erased", output=tmp_path / "merged"))
    by_peft = peft.PeftModel.from_pretrained(load_unet(base), tmp_path / "erased")
    torch.testing.assert_close(predict(load_unet(tmp_path / "merged")), predict(by_peft), rtol=1e-4, atol=1e-4)
    left = {p.name for p in (tmp_path / "merged").rglob("*")}
    assert not left & {"diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors"}


def test_a_merge_that_went_wrong_is_noticed_and_leaves_nothing(erased, tmp_path, monkeypatch):
    from esd_peft.io import tensors as weights

    honest = weights.TensorFile.write

    def careless(self, file, name, value):
        honest(self, file, name, value * 1.05)

    monkeypatch.setattr(weights.TensorFile, "write", careless)
    with pytest.raises(UserError, match="differs from base"):
        merge_adapter(MergeConfig(adapter=erased[0], output=tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_all_files_have_the_modes_of_the_umask(erased, small_sd, tmp_path):
    mask = os.umask(0o022)
    os.umask(mask)
    base = shutil.copytree(small_sd, tmp_path / "base")
    base.chmod(0o777)
    merge_adapter(MergeConfig(adapter=erased[0], base=str(base), output=tmp_path / "merged"))
    for path in (erased[0], *erased[0].rglob("*"), tmp_path / "merged", *(tmp_path / "merged").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
    base.chmod(0o700)  # nobody else's: neither is what is made of it
    for name in ("private", "private.safetensors"):
        merge_adapter(MergeConfig(adapter=erased[0], base=str(base), output=tmp_path / name))
    for path in (tmp_path / "private.safetensors", tmp_path / "private", *(tmp_path / "private").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_several_adapters_add_up(erased, small_sd, tmp_path):
    run(small_sd, tmp_path / "second", seed=1, scope="esd-x", learning_rate=0.1)
    record = merge_adapter(MergeConfig(adapter=[erased[0], tmp_path / "second"], output=tmp_path / "merged"))
    assert record["concept"] == ["circle", "circle"] and len(record["configs"]) == 2
    by_peft = load_unet(small_sd)
    for path in (erased[0], tmp_path / "second"):
        by_peft = peft.PeftModel.from_pretrained(by_peft, path).merge_and_unload()
    merged = predict(load_unet(tmp_path / "merged"))
    size = (merged - predict(load_unet(small_sd))).abs().max()
    assert (merged - predict(by_peft)).abs().max() < 0.1 * size


def test_whole_weights_do_not_add_up(erased, small_sd, tmp_path):
    run(small_sd, tmp_path / "weights", adapter_type="none", rank=None)
    with pytest.raises(UserError, match="merge it first"):
        merge_adapter(MergeConfig(adapter=[erased[0], tmp_path / "weights"], output=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_offloaded_base_gives_the_same_adapter(small_sd, tmp_path):
    for name, options in (("here", {}), ("offloaded", {"offload": True})):
        run(small_sd, tmp_path / name, gradient_checkpointing=True, scope="esd-x", num_validation_images=1, **options)
    here, offloaded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("here", "offloaded"))
    assert all(torch.equal(here[name], offloaded[name]) for name in here)
    assert (tmp_path / "offloaded" / "before_after.png").is_file()


def test_samples_may_pass_one_by_one(small_sd, tmp_path):
    whole = run(small_sd, tmp_path / "whole", max_train_steps=10)
    parts = run(small_sd, tmp_path / "parts", max_train_steps=10, per_device_batch_size=3)
    assert parts["loss"]["last"] == pytest.approx(whole["loss"]["last"], rel=1e-3)
    assert parts["nfe"] == whole["nfe"]
