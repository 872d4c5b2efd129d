"""The frozen base in 4 or 8 bits, through bitsandbytes' layers.

diffusers' own loader refuses to quantize without a GPU; bitsandbytes itself does not, so its layers are put in here.
"""

import bitsandbytes as bnb
import torch
from diffusers import ModelMixin
from torch import nn


def quantize_linears(denoiser: ModelMixin, how: str, dtype: torch.dtype) -> None:
    """Replace every `nn.Linear` in place by bitsandbytes' NF4 (`"nf4"`) or LLM.int8 (`"int8"`) layer.

    The weights are quantized when the module is next moved to a device. `dtype` is what they compute in.
    """
    for name, module in [(n, m) for n, m in denoiser.named_modules() if type(m) is nn.Linear]:
        parent, _, child = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, _quantized(module, how, dtype))
    # peft picks its layers by these marks, which transformers and diffusers set too
    setattr(denoiser, "is_loaded_in_4bit" if how == "nf4" else "is_loaded_in_8bit", True)


def _quantized(linear: nn.Linear, how: str, dtype: torch.dtype) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if how == "nf4":
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return layer
