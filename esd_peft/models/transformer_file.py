"""The weights of a denoiser alone in one file, as ComfyUI's `diffusion_models` folder has them.

They come under diffusers' names or the original code's, in 16 or 32 bits or quantized, and leave under diffusers' names in
16 or 32 bits.
"""

import json
from contextlib import suppress

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.tensors import check_finite, is_scale, is_unscaled
from esd_peft.models.parts import Part
from esd_peft.models.pixart_names import from_original_pixart

PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # ComfyUI's, before the names of a denoiser's layers
_OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "vae.", "text_encoders.")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_weight", "weight_scale")
_UNREAD = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")  # scales of activations, and marks
_CONVERTERS = {kind: entry["checkpoint_mapping_fn"] for kind, entry in SINGLE_FILE_LOADABLE_CLASSES.items()} | {
    "PixArtTransformer2DModel": from_original_pixart
}
_FORMATS = ("float8_e4m3fn", "float8_e5m2")  # as `comfy_quant` names them


def is_whole(tensors: dict[str, Tensor]) -> bool:
    """Return whether a file has a text encoder or a VAE beside its denoiser."""
    return any(name.startswith(_OTHER_PARTS) for name in tensors)


def dequantized(tensors: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """Return the weights in 16 bits or more, without scales and ComfyUI's prefixes.

    A weight in float8 becomes `w · s`, computed in fp32 and rounded once to `dtype_beside` of the others, as are these.
    Raises `UserError` for quantized weights of another kind.
    """
    tensors = {_without_prefix(name): value for name, value in tensors.items()}
    scales, weights = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == "comfy_quant":
            _check_format(value, f"{place}: {name}")
        if last in _SCALES:
            scales[f"{layer}.weight"] = value
        elif last not in _UNREAD:
            weights[name] = value
    for name, value in weights.items():
        if is_scale(name) or (value.numel() > 1 and not is_unscaled(value.dtype, name) and value.dtype not in _FLOAT8):
            raise UserError(
                f"{place} holds weights that are quantized in a way that is not read here ({name}); use a file in 16 bits, "
                "float8 or GGUF"
            )
    coarse = {name for name, value in weights.items() if value.dtype in _FLOAT8}
    if idle := sorted(scales.keys() - coarse):
        raise UserError(f"{place} has a scale for {idle[0]}, which is not in float8; use a file in 16 bits")
    if not coarse:
        return weights
    dtype = dtype_beside({value.dtype for name, value in weights.items() if name not in coarse and value.numel() > 1})
    return {
        name: (_scaled(value, scales.get(name), f"{place}: {name}") if name in coarse else value).to(dtype)
        for name, value in weights.items()
    }


def dtype_beside(others: set[torch.dtype]) -> torch.dtype:
    """Return the dtype for dequantized weights, by those of the weights beside them: fp16 if all are, else bf16."""
    return torch.float16 if others == {torch.float16} else torch.bfloat16


def under_diffusers_names(tensors: dict[str, Tensor], part: Part, place: str) -> dict[str, Tensor]:
    """Return the weights by diffusers' names, in which they may be already, through diffusers' own converter if it has one.

    Takes the tensors out of the map that it is given. Raises `UserError` unless they are all of the denoiser of `part`'s
    config, and nothing else, in name and shape.
    """
    kind, wanted, found = part.family.__name__, part.empty().state_dict(), tensors
    missing = [name for name in wanted if name not in tensors]
    if missing and kind in _CONVERTERS:
        prefix = PREFIXES[0] if kind == "UNet2DConditionModel" else ""  # which its converter looks for
        # each tensor is given up: those that are split would be in memory twice
        checkpoint, found = {prefix + name: tensors.pop(name) for name in [*tensors]}, {}
        with suppress(Exception):  # converters raise many kinds for layers that are not there
            found = _CONVERTERS[kind](checkpoint=checkpoint, config=part.config())
        missing = min(missing, [name for name in wanted if name not in found], key=len)
    fix = f"--checkpoint-config {part.path} has the config of another model, or the file is not whole; name those that fit"
    if missing:
        raise UserError(
            f"{place} is no {kind} under diffusers' names or the original code's, for it lacks {missing[0]}, the first of "
            f"{len(missing)}: {fix}"
        )
    if more := [name for name in found if name not in wanted]:
        raise UserError(f"{place} has weights, {more[0]} first, that are not in its {kind}: {fix}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise UserError(f"{place}: {name} is {[*found[name].shape]}, not {[*value.shape]}: {fix}")
        check_finite(f"{place}: {name}", found[name])
    return {name: found[name] for name in wanted}


def _without_prefix(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _scaled(weight: Tensor, scale: Tensor | None, place: str) -> Tensor:
    """Return `weight` `[rows, ...]` in fp32, times a scale for all of it or for each row."""
    value = weight.float()
    if scale is None:
        return value
    if not scale.is_floating_point() or scale.numel() not in (1, len(value)):
        raise UserError(
            f"{place} is scaled in blocks ({[*scale.shape]}), which is not read here; use a file in 16 bits or GGUF"
        )
    return value * scale.float().reshape(-1, *[1] * (value.dim() - 1))


def _check_format(mark: Tensor, place: str) -> None:
    """Raise `UserError` unless ComfyUI's mark of a quantized layer says that it is in float8."""
    try:
        name = json.loads(bytes(mark.tolist()))["format"]
    except (ValueError, TypeError, KeyError):
        name = "damaged"
    if name not in _FORMATS:
        raise UserError(f"{place} says {str(name)[:40]!a}, which is not read here; use a file in 16 bits, float8 or GGUF")
