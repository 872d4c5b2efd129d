"""The weight of a linear layer with a plain LoRA: W + s·B·A, in blocks of rows that stay in the processor's cache.

PEFT's own merge makes several passes over the whole weight in fp32. This one makes a pass over each block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

from esd_peft.adapters.deltas import AdaptedWeight

ROWS = 512  # of a block: 2.5 MB of fp32 for a layer of 1,280 inputs


@dataclass(frozen=True)
class LowRank(AdaptedWeight):
    """A base weight `[out, in]` of any float dtype, to which `up` `[out, rank]` times `down` `[rank, in]`, both fp32, is
    added."""

    weight: Tensor
    up: Tensor
    down: Tensor

    def effect(self, inputs: Tensor) -> Tensor:
        """See `AdaptedWeight`."""
        return (inputs @ self.down.T) @ self.up.T

    def merge(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `AdaptedWeight`."""
        merged = torch.empty_like(self.weight, dtype=dtype)
        for block, base, up in zip(merged.split(ROWS), self.weight.split(ROWS), self.up.split(ROWS), strict=True):
            block.copy_(torch.addmm(base.float(), up, self.down))
        return merged


def low_rank(layer: Any, weight: Tensor, scale: float) -> LowRank | None:
    """Return `weight` with `scale` times the adapter of PEFT's `layer`, or None if that is no plain LoRA on a Linear.

    Raises `ValueError` for values that are not finite.
    """
    if type(layer) is not lora.Linear or layer.fan_in_fan_out or layer.lora_variant or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    up, down = layer.lora_B[name], layer.lora_A[name]
    if up.bias is not None:
        return None
    found = LowRank(weight, scale * layer.scaling[name] * up.weight.detach().float(), down.weight.detach().float())
    if not (found.up.isfinite().all() and found.down.isfinite().all()):
        raise ValueError("there are NaN or infinite values in it")
    return found
