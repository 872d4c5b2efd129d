"""A transformer alone in one file, with the other parts from a directory or the hub: read, erased from and merged."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.adapters.export import write_checkpoint
from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.models.gguf_file import read_gguf
from esd_peft.options.model import ModelOptions
from families import draw_small, save_family
from hub import serve
from original_names import original_names
from runs import SHORTEST
from sources import open_in_new_process

try:
    import gguf
except ImportError:
    gguf = None
needs_gguf = pytest.mark.skipif(gguf is None, reason="gguf, an extra, is not installed")
FAMILIES = ["flux dev", "flux.2 dev", "flux.2 klein", "sd3", "z-image", "qwen-image", "chroma", "wan"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A hub home of its own for what is converted."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directory of a family's small model, made once, which is not to be written to."""
    made = {}

    def directory(name):
        if name not in made:
            made[name] = save_family(name, tmp_path_factory.mktemp("families") / "model")
        return made[name]

    return directory


@pytest.fixture(autouse=True)
def any_width(monkeypatch):
    """Make diffusers' converters of FLUX.1 and Chroma, which have the width 3072 written in, split any width."""
    split = torch.split

    def scaled(tensor, sizes, dim=0):
        if sizes == (3072, 3072, 3072, 12288):
            sizes = [size * tensor.shape[dim] // sum(sizes) for size in sizes]
        return split(tensor, sizes, dim=dim)

    monkeypatch.setattr(torch, "split", scaled)


def weights_of(model, dtype=torch.bfloat16):
    return {name: value.to(dtype) for name, value in load_file(model / "transformer" / NAME).items()}


def without_transformer(model, path):
    """The directory as a hobbyist may have it: the transformer's config, and not its weights."""
    return shutil.copytree(model, path, ignore=lambda folder, names: [NAME] if folder.endswith("transformer") else [])


def opened(path, config, **options):
    return open_family(str(path), options=ModelOptions(checkpoint_config=str(config), **options))


def same(family, expected):
    found = load_file(family.denoiser_files()[0])
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", [*FAMILIES, "pixart"])
def test_both_namings_of_a_transformer_are_read(models, tmp_path, home, name):
    weights, config = weights_of(models(name)), without_transformer(models(name), tmp_path / "config")
    save_file(weights, tmp_path / "plain.safetensors")
    family = opened(tmp_path / "plain.safetensors", config)
    same(family, weights)
    assert family.name == "plain" and family.load_part("vae") is not None
    if name == "qwen-image":
        return
    original = original_names(name, weights)
    assert original.keys() != weights.keys()
    save_file({f"model.diffusion_model.{key}": value for key, value in original.items()}, tmp_path / "original.safetensors")
    same(opened(tmp_path / "original.safetensors", config), weights)


def test_the_u_net_of_a_checkpoint_is_read_alone(small_sd, tmp_path, home):
    write_checkpoint(tmp_path / "sd.safetensors", open_family(str(small_sd)), lambda name, weight: weight, {})
    head = "model.diffusion_model."
    weights = {key: value for key, value in load_file(tmp_path / "sd.safetensors").items() if key.startswith(head)}
    for prefix in ("", head):
        save_file({prefix + key.removeprefix(head): value for key, value in weights.items()}, tmp_path / "unet.safetensors")
        same(opened(tmp_path / "unet.safetensors", small_sd), load_file(small_sd / "unet" / NAME))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dtype_of_the_file_is_kept_and_either_prefix_read(models, tmp_path, home, dtype):
    weights = weights_of(models("z-image"), dtype)
    save_file({f"diffusion_model.{key}": value for key, value in weights.items()}, tmp_path / "z.safetensors")
    same(opened(tmp_path / "z.safetensors", models("z-image")), weights)


def test_the_other_parts_come_from_a_hub_id_and_the_transformer_is_not_downloaded(models, tmp_path):
    save_file(weights_of(models("z-image")), tmp_path / "z.safetensors")
    calls = [(str(tmp_path / "z.safetensors"), {"checkpoint_config": "owner/z"})]
    with serve({"owner/z": models("z-image")}) as (address, asked):
        (path,) = open_in_new_process(calls, HF_HOME=tmp_path / "home", HF_ENDPOINT=address)
    assert path.endswith("/z") and "vae/diffusion_pytorch_model.safetensors" in asked
    assert [file for file in asked if "transformer/" in file and "config" not in file] == []
    assert open_in_new_process(calls, HF_HOME=tmp_path / "home", HF_HUB_OFFLINE="1") == [path]


@pytest.mark.parametrize("name", ["flux dev", "z-image"])
def test_an_erasure_from_a_transformer_file_is_merged_and_read_again(models, tmp_path, home, monkeypatch, name):
    draw_small(monkeypatch)
    weights, config = weights_of(models(name)), without_transformer(models(name), tmp_path / "config")
    save_file(original_names(name, weights), tmp_path / "it.safetensors")
    check_erasure(tmp_path, tmp_path / "it.safetensors", config, weights)


def check_erasure(folder, model, config, weights):
    """Erase from the file, merge to a directory and to a file, and compare with `weights`, the file's, and the adapter."""
    options = SHORTEST | {"learning_rate": 0.1, "model": str(model), "checkpoint_config": str(config)}
    erase(EraseConfig(concept="circle", output=folder / "erased", **options))
    merge_adapter(MergeConfig(adapter=[folder / "erased"], output=folder / "merged"))
    merged, changed = weights_of(folder / "merged"), weights | changes(folder / "erased", weights)
    assert changed.keys() == merged.keys() and any(not torch.equal(changed[key], weights[key]) for key in weights)
    assert all(torch.equal(merged[key], value) for key, value in changed.items())
    merge_adapter(MergeConfig(adapter=[folder / "erased"], output=folder / "one.safetensors"))
    same(opened(folder / "one.safetensors", config), merged)


def changes(adapter, weights):
    """Return the layers that a LoRA changes: `W + α/r B A`, rounded to the dtype of `W`."""
    saved, settings = (
        load_file(adapter / "adapter_model.safetensors"),
        json.loads((adapter / "adapter_config.json").read_text()),
    )
    layers = [key.removesuffix("lora_A.weight") for key in saved if key.endswith("lora_A.weight")]
    found = {}
    for layer in layers:
        name, scale = f"{layer.removeprefix('base_model.model.')}weight", settings["lora_alpha"] / settings["r"]
        change = scale * saved[f"{layer}lora_B.weight"].float() @ saved[f"{layer}lora_A.weight"].float()
        found[name] = (weights[name].float() + change.reshape(weights[name].shape)).to(weights[name].dtype)
    return found


def test_a_file_that_is_no_transformer_of_that_config_is_refused(models, tmp_path, home):
    model = models("z-image")
    weights, config = weights_of(model), without_transformer(model, tmp_path / "config")

    def said(tensors, config=config):
        save_file(tensors, tmp_path / "odd.safetensors")
        with pytest.raises(UserError) as error:
            open_family(str(tmp_path / "odd.safetensors"), options=ModelOptions(checkpoint_config=config and str(config)))
        assert not [*home.rglob("model_index.json")]
        return str(error.value)

    assert "hub id that has them with --checkpoint-config" in said(weights, None)
    first = next(iter(weights))
    assert f"lacks {first}, the first of 1: --checkpoint-config" in said({k: v for k, v in weights.items() if k != first})
    assert "has weights, extra first, that are not in its ZImage" in said(weights | {"extra": torch.zeros(2)})
    assert f"{first} is [3, 2], not [32]: --checkpoint-config" in said(weights | {first: torch.zeros(3, 2)})
    assert f"{first} holds a value that is not a number" in said(weights | {first: weights[first] / 0})
    assert "is no FluxTransformer2DModel under diffusers' names or the original code's" in said(weights, models("flux dev"))
    assert "is not a diffusers pipeline directory: it has no model_index.json" in said(weights, tmp_path)
    (config / "vae" / NAME).unlink()
    assert "lacks the weights of its vae, which" in said(weights)


def in_float8(weights, scaling, dtype=torch.float8_e4m3fn):
    """The matrices in float8 under ComfyUI's names, and what they stand for, in fp32."""
    stored, values = {}, {}
    for name, value in weights.items():
        stored[name] = values[name] = value
        if value.dim() != 2 or not name.endswith(".weight"):
            continue
        layer, limit = name.removesuffix("weight"), torch.finfo(dtype).max
        peaks = value.float().abs().amax(1, keepdim=True)
        scale = {"plain": torch.ones(()), "rows": peaks / limit, "row vector": peaks[:, 0] / limit}.get(
            scaling, peaks.max() / limit
        )
        column = scale[:, None] if scale.dim() == 1 else scale
        stored[name] = (value.float() / column).to(dtype)
        values[name] = stored[name].float() * column
        if scaling != "plain":
            stored[f"{layer}{'scale_weight' if scaling == 'scale_weight' else 'weight_scale'}"] = scale
        if scaling == "scale_weight":
            stored |= {f"{layer}scale_input": torch.ones(()), "scaled_fp8": torch.zeros(2, dtype=dtype)}
        elif scaling == "weight_scale":
            mark = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
            stored |= {f"{layer}comfy_quant": torch.tensor([*mark], dtype=torch.uint8)}
    return stored, values


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaling", ["plain", "scale_weight", "weight_scale", "rows", "row vector"])
def test_float8_is_the_weight_times_its_scale_rounded_once(models, tmp_path, home, scaling, kind):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        stored, values = in_float8(weights_of(models("qwen-image"), dtype), scaling, kind)
        save_file({f"model.diffusion_model.{key}": value for key, value in stored.items()}, tmp_path / "eight.safetensors")
        kept = dtype if dtype == torch.float16 else torch.bfloat16
        same(opened(tmp_path / "eight.safetensors", models("qwen-image")), {key: v.to(kept) for key, v in values.items()})


def test_an_erasure_from_scaled_float8_under_the_original_names(models, tmp_path, home, monkeypatch):
    draw_small(monkeypatch)
    original = original_names("z-image", weights_of(models("z-image")))
    stored, _ = in_float8(original, "scale_weight")
    save_file(stored, tmp_path / "eight.safetensors")
    weights = load_file(opened(tmp_path / "eight.safetensors", models("z-image")).denoiser_files()[0])
    check_erasure(tmp_path, tmp_path / "eight.safetensors", models("z-image"), weights)


def write_gguf(path, weights, kind):
    """The matrices whose rows allow it in that type, the rest in F32; what gguf makes of it again, in fp32."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer, values, generator = gguf.GGUFWriter(path, "flux"), {}, np.random.default_rng(0)
    for name, value in weights.items():
        value, stored, raw = value.float().numpy(), gguf.GGMLQuantizationType.F32, value.float().numpy()
        if value.ndim == 2 and value.shape[1] % block == 0:
            stored = kind
            try:
                raw = gguf.quantize(value, kind)
            except NotImplementedError:  # K-quants: the package reads them only, so any bits in range of their scales
                raw = generator.integers(0, 32, (len(value), value.shape[1] // block * size), dtype=np.uint8)
        elif len(value.shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", [*value.shape])
            raw = value.reshape(len(value), -1)
        writer.add_tensor(name, raw, raw_dtype=stored)
        values[name] = torch.from_numpy(np.array(gguf.dequantize(raw, stored))).reshape(weights[name].shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@needs_gguf
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "BF16", "F16"])
@pytest.mark.parametrize("name", ["flux dev", "wan", "z-image"])
def test_gguf_is_what_its_own_package_dequantises(models, tmp_path, home, name, kind):
    weights = weights_of(models(name))
    values = write_gguf(tmp_path / "it.gguf", original_names(name, weights), kind)
    dtype = torch.bfloat16 if kind.startswith("Q") else torch.float32
    save_file({key: value.to(dtype) for key, value in values.items()}, tmp_path / "it.safetensors")
    expected = load_file(opened(tmp_path / "it.safetensors", models(name)).denoiser_files()[0])
    same(opened(tmp_path / "it.gguf", models(name)), expected)
    assert not kind.startswith("Q") or any(not torch.equal(expected[key], value.to(dtype)) for key, value in weights.items())


@needs_gguf
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_k_quants_are_what_their_own_package_dequantises(tmp_path, kind):
    values = write_gguf(tmp_path / "it.gguf", {"a": torch.ones(3, 512), "b": torch.ones(2)}, kind)
    found = read_gguf(tmp_path / "it.gguf", "--model")
    assert values["a"].std() > 0 and torch.equal(found["b"], torch.ones(2, dtype=torch.bfloat16))
    assert torch.equal(found["a"], values["a"].bfloat16())


@needs_gguf
def test_an_erasure_from_gguf_under_the_original_names(models, tmp_path, home, monkeypatch):
    draw_small(monkeypatch)
    write_gguf(tmp_path / "it.gguf", original_names("z-image", weights_of(models("z-image"))), "Q8_0")
    weights = load_file(opened(tmp_path / "it.gguf", models("z-image")).denoiser_files()[0])
    check_erasure(tmp_path, tmp_path / "it.gguf", models("z-image"), weights)


@needs_gguf
def test_gguf_that_cannot_be_read(models, tmp_path, home, monkeypatch):
    path = tmp_path / "it.gguf"

    def said():
        with pytest.raises(UserError) as error:
            opened(path, models("flux dev"))
        assert not [*home.rglob("model_index.json")]
        return str(error.value)

    assert said() == f"--model {path} is not there; name a file, a directory or a hub id"
    path.write_bytes(b"GGUF")
    assert "cannot be read as GGUF" in said()
    weights = weights_of(models("flux dev"))
    write_gguf(path, weights | {"img_in.weight": torch.ones(32, 16)}, "Q4_0")
    assert "has weights, img_in.weight first, that are not in its FluxTransformer2DModel" in said()
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("a", np.zeros((2, 4), dtype=np.int8), raw_dtype=gguf.GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "stores a as I8, which the gguf package cannot dequantise; name a file of another type" in said()
    path.write_bytes(path.read_bytes().replace(gguf.GGMLQuantizationType.I8.to_bytes(4, "little"), b"\xe7\x03\0\0"))
    assert "cannot be read as GGUF" in said()
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert said() == f"--model {path} needs a package that is not here; pip install gguf"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_scale": torch.ones(2, 2)}, r"img_in\.weight is scaled in blocks \(\[2, 2\]\)"),
        ({"weight_scale": torch.ones((), dtype=torch.uint8)}, "is scaled in blocks"),
        ({"weight_scale_inv": torch.ones(2, 2)}, r"quantized in a way that is not read here \(img_in\.weight_scale_inv\)"),
        ({"weight": torch.ones(32, 16, dtype=torch.int8)}, r"quantized in a way that is not read here \(img_in\.weight\)"),
        ({"comfy_quant": torch.tensor([*b'{"format": "nvfp4"}'], dtype=torch.uint8)}, "comfy_quant says 'nvfp4'"),
        ({"comfy_quant": torch.tensor([*b"{{"], dtype=torch.uint8)}, "comfy_quant says 'damaged'"),
        ({"weight": torch.ones(32, 16), "weight_scale": torch.ones(())}, "has a scale for img_in.weight, which is not in"),
    ],
)
def test_other_ways_to_quantize_are_refused(models, tmp_path, home, change, says):
    stored, _ = in_float8(weights_of(models("qwen-image")), "plain")
    save_file(stored | {f"img_in.{key}": value for key, value in change.items()}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=says):
        opened(tmp_path / "odd.safetensors", models("qwen-image"))
    assert not [*home.rglob("model_index.json")]
