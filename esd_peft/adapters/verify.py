"""Verification that merged weights act like base + adapter: each layer gets the same random inputs, one layer at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esd_peft.adapters.deltas import WeightDelta
from esd_peft.adapters.low_rank import ROWS
from esd_peft.errors import UserError
from esd_peft.runtime.seeds import generator

SAMPLES = 8  # random inputs for each layer


@dataclass
class Verification:
    """The largest relative differences so far, ‖a − b‖ / ‖b‖ over a layer's outputs."""

    adapter_changes: float = 0.0  # base + adapter against the base
    largest_difference: float = 0.0  # merged against base + adapter
    bound: float = 1e-5  # tolerance for rounding: the eps of the stored dtypes

    def inputs(self, name: str, weight: Tensor, changes: list[WeightDelta]) -> Tensor:
        """Return random inputs for the layer with that weight, the same each time."""
        return _inputs(changes[0].layer, weight, name)

    @torch.no_grad()
    def check(self, name: str, base: Tensor, merged: Tensor, changes: list[WeightDelta], effect: Tensor) -> None:
        """Compare the stored weights `base` and `merged`; `effect` is what the adapters together add for `inputs`.

        Rounding changes each weight by at most eps/2 of itself, independently, so that an output with random inputs is
        off by about 0.3 eps; fp32 sums in another order differ too. Below the smallest normal number it is coarser.
        Raises `UserError` if rounding does not explain a difference.
        """
        layer, inputs = changes[0].layer, self.inputs(name, base, changes)
        plain, seen = _outputs(layer, base, inputs), _outputs(layer, merged, inputs)
        adapted = plain + effect
        kind = torch.finfo(merged.dtype)
        bound = max(kind.eps, 1e-5)
        floor = kind.smallest_normal * kind.eps * (inputs.norm().item() if layer else 1) * seen.numel() ** 0.5
        difference, size = (seen - adapted).norm().item(), adapted.norm().item()
        if not difference <= bound * size + floor:
            raise UserError(
                f"--adapter: {name} as merged differs from base + adapter by {difference / max(size, 1e-30):.3g} of its "
                f"size, more than rounding to {merged.dtype} explains ({bound:.3g}); nothing was written"
            )
        self.bound = max(self.bound, bound)
        self.largest_difference = max(self.largest_difference, difference / max(size, floor, 1e-30))
        self.adapter_changes = max(self.adapter_changes, effect.norm().item() / max(plain.norm().item(), 1e-30))


def _inputs(layer: nn.Module | None, weight: Tensor, name: str) -> Tensor:
    """Standard normal inputs of the layer `[SAMPLES, in]`, of a convolution `[1, in, SAMPLES, SAMPLES]`."""
    if layer is None:
        return weight
    draws = generator(0, f"verify {name}")
    if isinstance(layer, nn.Conv2d):
        return torch.randn(1, layer.in_channels, SAMPLES, SAMPLES, generator=draws)
    return torch.randn(SAMPLES, weight.shape[1], generator=draws)


def _outputs(layer: nn.Module | None, weight: Tensor, inputs: Tensor) -> Tensor:
    if layer is None:
        return weight.float()
    if isinstance(layer, nn.Conv2d):
        return nn.functional.conv2d(inputs, weight.float(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return torch.cat([nn.functional.linear(inputs, rows.float()) for rows in weight.split(ROWS)], dim=-1)
