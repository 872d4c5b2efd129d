"""Changes that an adapter makes to one base weight, for all kinds of adapters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class AdaptedWeight(ABC):
    """One base weight with an adapter on it."""

    @abstractmethod
    def effect(self, inputs: Tensor) -> Tensor:
        """Return the adapter's contribution to the layer's output for `inputs`, fp32; without a layer, its contribution to
        the weight.
        """

    @abstractmethod
    def merge(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the merged weight, computed in fp32 and rounded once. The adapter cannot be used afterwards."""


class WeightDelta(ABC):
    """The change that an adapter makes to one base weight."""

    layer: nn.Module | None  # the layer of the weight, in the base's sizes; None: the weight is verified by itself
    adds: bool  # its difference from the base's weight can be added to that of others

    @abstractmethod
    def on(self, weight: Tensor) -> AdaptedWeight:
        """Put the adapter on `weight`, which stays unchanged."""


@dataclass(frozen=True)
class Replacement(WeightDelta):
    """A new value for the weight; it is added as `scale` times its difference from the base's."""

    read: Callable[[], Tensor]  # the value, as stored
    scale: float = 1.0
    layer: None = None
    adds: bool = False

    def on(self, weight: Tensor) -> AdaptedWeight:
        return _Replaced(weight.float(), self.read().float(), self.scale)


@dataclass(frozen=True)
class _Replaced(AdaptedWeight):
    weight: Tensor
    value: Tensor
    scale: float

    def effect(self, inputs: Tensor) -> Tensor:
        return self.scale * (self.value - self.weight)

    def merge(self, dtype: torch.dtype = torch.float32) -> Tensor:
        merged = self.value if self.scale == 1 else torch.lerp(self.weight, self.value, self.scale)
        return merged.to(dtype)
