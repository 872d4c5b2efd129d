"""Merging: how much, into what, and what is checked; what is read from where is in test_model_source."""

import json
import os
import re
import shutil

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from safetensors.torch import load_file, save_file

from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, erase, merge_adapter
from esd_peft.adapters.merge import merge_weight
from esd_peft.adapters.saved import WEIGHTS_FILE, read_adapter
from esd_peft.adapters.verify import Verification
from esd_peft.errors import UserError
from esd_peft.evaluation.comparison import open_models
from esd_peft.io.tensors import copy_with_sha256, sha256
from esd_peft.models import open_family
from esd_peft.options.command_line import parse
from hub import fill_cache
from pipelines import small_stable_diffusion

QUICK = {"num_inference_steps": 2, "trajectories": 2, "max_train_steps": 3, "rank": 2, "device": "cpu",
         "num_validation_images": 0, "learning_rate": 0.1}  # fmt: skip

KINDS = {"lora": {}, "lokr": {"adapter_type": "lokr"}, "none": {"adapter_type": "none", "rank": None}}


def run(model, output, **options):
    erase(EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options)))
    return output


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In fp32, so that nothing is rounded."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("adapters") / request.param, **KINDS[request.param])


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return run(base, tmp_path_factory.mktemp("adapters") / "lora", alpha=3.0)


def weights_of(path, variant=""):
    return load_file(path / "unet" / f"diffusion_pytorch_model{variant}.safetensors")


def test_scale_is_a_straight_line_from_the_base_to_the_merge(base, adapter, tmp_path):
    merged = []
    for scale in (0.25, 1.0):
        merge_adapter(MergeConfig(adapter=adapter, scale=scale, output=tmp_path / str(scale)))
        merged.append(weights_of(tmp_path / str(scale)))
    start = weights_of(base)
    for name in start:
        expected = start[name] + 0.25 * (merged[1][name] - start[name])
        torch.testing.assert_close(merged[0][name], expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(start[name], merged[1][name]) for name in start)


def test_a_scaled_adapter_applied_is_what_is_merged(base, adapter, tmp_path):
    merge_adapter(MergeConfig(adapter=adapter, scale=0.5, output=tmp_path / "merged"))
    applied = read_adapter(adapter, 0.5).apply(open_family(str(base)).load_denoiser(torch.float32))
    merged = open_family(str(tmp_path / "merged")).load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(0)
    latents, embeds = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 16, 24, generator=generator)
    with torch.no_grad():
        seen, expected = (unet(latents, torch.tensor([300]), embeds).sample for unet in (merged, applied))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_each_adapter_has_its_own_scale(base, lora, tmp_path):
    other = run(base, tmp_path / "other", seed=1)
    merge_adapter(MergeConfig(adapter=[lora, other], scale=[0.5, 2], output=tmp_path / "merged"))
    found, start = weights_of(tmp_path / "merged"), weights_of(base)
    total = dict(start)
    for path, scale in ((lora, 0.5), (other, 2)):
        config, saved = peft.PeftConfig.from_pretrained(path), load_file(path / "adapter_model.safetensors")
        for key in [key for key in saved if key.endswith("lora_A.weight")]:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            product = saved[key.replace("lora_A", "lora_B")] @ saved[key]  # W + s α/r B A
            total[name] = total[name] + scale * config.lora_alpha / config.r * product
    for name in start:
        torch.testing.assert_close(found[name], total[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--scale", "0"], "--scale"),
        (["--scale", "-1"], "--scale"),
        (["--scale", "1", "--scale", "1"], "--scale: give it once, or once for each of the 1 adapters"),
        (["--unmerge"], "--unmerge would bring the concept back"),
    ],
    ids=" ".join,
)
def test_what_a_merge_cannot_do(argv, says):
    with pytest.raises(UserError, match=says):
        parse(MergeConfig, "merge_adapter", ["--adapter", "a", "--output", "b", *argv])


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_an_adapter_trained_on_a_quantized_base_merges_into_the_unquantized_one(base, tmp_path, quantize):
    path = run(base, tmp_path / "a", quantize=quantize, scope="esd-x")
    merge_adapter(MergeConfig(adapter=path, output=tmp_path / "merged"))
    by_peft = peft.PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), path).merge_and_unload()
    found, expected = weights_of(tmp_path / "merged"), by_peft.state_dict()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


def test_a_sharded_variant_merges_under_plain_names(base, lora, tmp_path):
    model = small_stable_diffusion(tmp_path / "model", variant="fp16", max_shard_size="300KB", dtype=torch.float16)
    merge_adapter(MergeConfig(adapter=lora, base=str(model), variant="fp16", output=tmp_path / "merged"))
    names = {file.name for file in (tmp_path / "merged").rglob("*") if file.is_file()}
    assert f"{NAME}.index.json" in names and not any("fp16" in name for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    by_peft = peft.PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(base / "unet"), lora).merge_and_unload()
    expected = by_peft.state_dict()
    found = pipe.unet.state_dict()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in found)


def test_an_adapter_trained_on_a_snapshot_finds_it_again(base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = fill_cache(tmp_path / "hub", "owner/sd", base)
    path = run("owner/sd", tmp_path / "a")
    assert json.loads((path / "base.json").read_text())["revision"] == snapshot.name
    record = merge_adapter(MergeConfig(adapter=path, output=tmp_path / "merged"))
    assert record["base"]["name"] == "owner/sd" and record["base"]["trained_on_it"]
    assert not any(file.is_symlink() for file in (tmp_path / "merged").rglob("*"))


def test_a_mixed_dtype_base_keeps_each_tensors_dtype(base, lora, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    file = model / "unet" / NAME
    mixed = {name: value.half() if "attn2" in name else value for name, value in load_file(file).items()}
    save_file(mixed, file)
    merge_adapter(MergeConfig(adapter=lora, base=str(model), output=tmp_path / "merged"))
    assert {name: value.dtype for name, value in weights_of(tmp_path / "merged").items()} == {
        name: value.dtype for name, value in mixed.items()
    }


def test_weights_in_8_bits_are_not_merged_into(base, lora, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    file = model / "unet" / NAME
    save_file({n: v.to(torch.float8_e4m3fn) if "attn2" in n else v for n, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="as F8_E4M3, too coarse to erase from; use 16 or 32 bits"):
        merge_adapter(MergeConfig(adapter=lora, base=str(model), output=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_family_is_refused(lora, tmp_path):
    other = shutil.copytree(lora, tmp_path / "other")
    values = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps(values | {"class": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"was trained on a FluxPipeline; --base .* is a StableDiffusionPipeline"):
        merge_adapter(MergeConfig(adapter=other, output=tmp_path / "merged"))


@pytest.mark.parametrize("file", ["adapter_config.json", "config.yaml", "adapter_model.safetensors"])
def test_a_flipped_bit_in_any_file_of_the_adapter_is_seen(lora, tmp_path, file):
    copy = shutil.copytree(lora, tmp_path / "copy")
    content = bytearray((copy / file).read_bytes())
    place = {"adapter_config.json": content.find(b'"lora_alpha": 3') + 14, "config.yaml": content.find(b"circle")}.get(
        file, -1
    )
    content[place] ^= 1  # the file is as readable as before: alpha is 2, the concept biscle
    (copy / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is damaged: it is not what was saved"):
        merge_adapter(MergeConfig(adapter=copy, output=tmp_path / "merged"))


def test_an_adapter_cannot_allow_pickles(lora, base, tmp_path):
    copy = shutil.copytree(lora, tmp_path / "copy")
    (tmp_path / "evil.ckpt").write_bytes(b"a pickle")
    values = json.loads((copy / "base.json").read_text())
    (copy / "base.json").write_text(json.dumps(values | {"model": str(tmp_path / "evil.ckpt"), "allow_pickle": True}))
    with pytest.raises(UserError, match=r"--base .* is a pickle"):
        merge_adapter(MergeConfig(adapter=copy, output=tmp_path / "merged"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7])
def test_verification_allows_rounding_and_nothing_more(lora, base, dtype, size):
    changes = read_adapter(lora).changes(open_family(str(base)).empty_denoiser())
    name, change = next(iter(changes.items()))
    weight = (weights_of(base)[name] * size).to(dtype)
    inputs = Verification().inputs(name, weight, [change])
    merged, effect = merge_weight(weight, [change], inputs)
    Verification().check(name, weight, merged.to(dtype), [change], effect)
    for wrong in (merged * 1.02, torch.full_like(weight, torch.nan)):
        with pytest.raises(UserError, match="differs from base"):
            Verification().check(name, weight, wrong.to(dtype), [change], effect)


def test_a_copy_is_hashed_on_the_way(tmp_path):
    source = tmp_path / "file"
    source.write_bytes(bytes(range(256)) * 200_000)  # more than one chunk
    assert copy_with_sha256(source, tmp_path / "copy") == sha256(source)
    assert source.read_bytes() == (tmp_path / "copy").read_bytes()


def test_whole_weights_and_an_adapter_of_one_layer_are_not_added_up(base, lora, tmp_path):
    run(base, tmp_path / "weights", adapter_type="none", rank=None)
    for order in ([tmp_path / "weights", lora], [lora, tmp_path / "weights"]):
        with pytest.raises(
            UserError, match=rf"{tmp_path / 'weights'} replaces weights that another adapter changes; merge it first"
        ):
            merge_adapter(MergeConfig(adapter=order, base=str(base), output=tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def altered(path, to, change):
    """A copy of an adapter, whose tensors are what `change` makes of them."""
    copy = shutil.copytree(path, to)
    (copy / "base.json").unlink()  # it knows the bits of the files
    file = copy / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return copy


NOTHING = {
    "no tensors": (lambda tensors: {}, "holds no tensors, so it changes nothing"),
    "A without B": (lambda tensors: {n: v for n, v in tensors.items() if "lora_A" in n}, r"there is no .*lora_B"),
    "B without A": (lambda tensors: {n: v for n, v in tensors.items() if "lora_B" in n}, r"there is no .*lora_A"),
    "zeros": (lambda tensors: {n: v * 0 for n, v in tensors.items()}, r"changes nothing: all \d+ weights"),
    "not trained": (lambda tensors: {n: v * ("lora_A" in n) for n, v in tensors.items()}, "changes nothing"),
    "less than rounding": (lambda tensors: {n: v * 1e-12 for n, v in tensors.items()}, "changes nothing"),
}


@pytest.mark.parametrize(("change", "says"), NOTHING.values(), ids=NOTHING)
def test_a_merge_of_nothing_is_refused(base, lora, tmp_path, change, says):
    nothing = altered(lora, tmp_path / "nothing", change)
    for adapters in ([nothing], [lora, nothing]):  # beside one that does something it would be said to be erased as well
        with pytest.raises(UserError, match=rf"--adapter {nothing}.*{says}"):
            merge_adapter(MergeConfig(adapter=adapters, base=str(base), output=tmp_path / "merged"))
    with pytest.raises(UserError, match=says):
        merge_adapter(MergeConfig(adapter=nothing, base=str(base), output=tmp_path / "merged.safetensors"))
    assert not (tmp_path / "merged").exists() and not (tmp_path / "merged.safetensors").exists()


def test_an_alpha_of_zero_and_whole_weights_that_are_the_bases_are_refused(base, lora, tmp_path):
    nothing = altered(lora, tmp_path / "alpha", dict)
    config = nothing / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 0}))
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({n: v for n, v in weights_of(base).items() if "attn2.to_k" in n}, weights / WEIGHTS_FILE)
    for path in (nothing, weights):
        with pytest.raises(UserError, match=rf"--adapter {path} changes nothing"):
            merge_adapter(MergeConfig(adapter=path, base=str(base), output=tmp_path / "merged"))


def test_layers_that_the_file_lacks_are_said_in_the_card_too(base, lora, tmp_path, capsys):
    (left_out,) = [n for n in load_file(lora / "adapter_model.safetensors") if "up_blocks" in n and "to_k.lora_A" in n][:1]
    layer = left_out.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    half = altered(lora, tmp_path / "half", lambda found: {n: v for n, v in found.items() if f"{layer}." not in n})
    record = merge_adapter(MergeConfig(adapter=half, base=str(base), output=tmp_path / "merged"))
    says = rf"no tensors for 1 of the \d+ layers that its config names, {layer} first"
    (note,) = record["notes"]
    assert re.search(says, note) and f"note: {note}" in capsys.readouterr().err
    assert re.search(says, (tmp_path / "merged" / "README.md").read_text().replace("\\", ""))
    assert re.search(says, evaluated_notes(half, base)[0])
    whole = merge_adapter(MergeConfig(adapter=lora, base=str(base), output=tmp_path / "whole"))
    assert whole["notes"] == [] == evaluated_notes(lora, base) and "note:" not in capsys.readouterr().err


def evaluated_notes(adapter, base):
    return open_models(EvaluateConfig(erased=adapter, base=str(base), device="cpu")).notes


def test_a_pipe_is_no_checkpoint_of_ours(lora, base, tmp_path):
    os.mkfifo(tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="was not written by this command"):
        merge_adapter(MergeConfig(adapter=lora, base=str(base), output=tmp_path / "out.safetensors", overwrite=True))
