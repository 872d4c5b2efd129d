"""The frozen base in 4 or 8 bits, through bitsandbytes' layers.

diffusers' own loader refuses to quantize without a GPU; bitsandbytes itself does not, so its layers are put in here. Weights
are read and quantized one at a time: a base never lies in host memory as a whole.
"""

import importlib
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.io.tensors import check_finite, open_tensors
from esd_peft.models import ModelFamily
from esd_peft.runtime.devices import has_bitsandbytes


def bitsandbytes(option: str) -> Any:
    """The library, which is loaded only where it is asked for.

    Raises `UserError`, naming the `option` that asks, where it is not installed or does not load.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # its native parts raise other errors than ImportError, too
        raise UserError(
            f"{option} needs the package bitsandbytes, which does not load here ({error}); pip install it, or leave "
            "the option out"
        ) from None


def check_bitsandbytes(device: torch.device, quantize: str, optimizer: str = "AdamW") -> None:
    """Raises `UserError`, before any work, if one of the two needs bitsandbytes and it is not there, or not for `device`."""
    for option, value, plain in (("--quantize", quantize, "none"), ("--optimizer", optimizer, "AdamW")):
        if value == plain:
            continue
        if not has_bitsandbytes(device):
            raise UserError(f"{option} {value} needs bitsandbytes, which has no kernels for Apple's GPUs; leave it out")
        bitsandbytes(f"{option} {value}")


def load_quantized(family: ModelFamily, how: str, dtype: torch.dtype, device: torch.device) -> ModelMixin:
    """Load the frozen denoiser on `device`, with each `nn.Linear` as bitsandbytes' NF4 (`"nf4"`) or LLM.int8 (`"int8"`)
    layer.

    All other weights are in `dtype`, in which the layers also compute; so is the first layer, a small one, from which
    pipelines read their dtype. Weights that diffusers keeps in fp32 stay so. Raises `UserError` if the files do not hold all
    of the denoiser.
    """
    bnb = bitsandbytes(f"--quantize {how}")
    denoiser = family.empty_part(family.denoiser_part, buffers=True)
    first = next(denoiser.named_parameters())[0]
    precise = {*(denoiser._keep_in_fp32_modules or ())}
    for path in family.denoiser_files():
        tensors = open_tensors(path)
        with path.open("rb") as file:
            for name in tensors.entries:
                value = tensors.read(file, name)
                check_finite(f"{family.option} {path}: {name}", value)
                kept = not precise.isdisjoint(name.split("."))
                packing = "none" if kept or name == first else how
                _place(bnb, denoiser, name, value, packing, torch.float32 if kept else dtype, device)
    if missing := [name for name, parameter in denoiser.named_parameters() if parameter.is_meta]:
        raise UserError(f"{family.option} {family.path} lacks weights, {missing[0]} first; restore its files")
    # peft picks its layers by these marks, which transformers and diffusers set too
    setattr(denoiser, "is_loaded_in_4bit" if how == "nf4" else "is_loaded_in_8bit", True)
    return denoiser.to(device).requires_grad_(False)  # its new layers in train mode: else bitsandbytes repacks them on a CPU


def stay_packed(denoiser: nn.Module) -> None:
    """After an adapter was put on a quantized base: keep bitsandbytes from repacking layers on a CPU, which it does in eval
    mode only."""
    bnb = bitsandbytes("--quantize")
    for layer in denoiser.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.train()


def _place(
    bnb: Any, denoiser: ModelMixin, name: str, value: Tensor, how: str, dtype: torch.dtype, device: torch.device
) -> None:
    parent, _, leaf = name.rpartition(".")
    module = denoiser.get_submodule(parent)
    if type(module) is nn.Linear and leaf == "weight" and how != "none":
        above, _, child = parent.rpartition(".")
        setattr(denoiser.get_submodule(above), child, _quantized(bnb, module, value, how, dtype, device))
    elif leaf in module._buffers:
        module._buffers[leaf] = value.to(device)
    else:
        setattr(module, leaf, nn.Parameter(value.to(device, dtype), requires_grad=False))


def _quantized(bnb: Any, linear: nn.Linear, weight: Tensor, how: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """`linear` with `weight`; its bias comes, or has come, by itself."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    # on the meta device: bitsandbytes draws initial weights at random, which takes longer than all else
    if how == "nf4":
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    layer.bias = linear.bias
    return layer
