"""What an adapter does to one base weight, whatever kind of adapter it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class AdaptedWeight(ABC):
    """One base weight with an adapter on it."""

    @abstractmethod
    def effect(self, inputs: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for `inputs`, fp32; without a layer: to the weight."""

    @abstractmethod
    def merge(self) -> Tensor:
        """The merged weight, fp32. There is no adapter afterwards."""


class WeightDelta(ABC):
    """What an adapter does to one base weight."""

    layer: nn.Module | None  # that the weight belongs to, of the base's sizes; none: the weight is looked at by itself
    adds: bool  # its difference from the base's weight can be added to others'; otherwise it acts alone

    @abstractmethod
    def on(self, weight: Tensor) -> AdaptedWeight:
        """The adapter on that weight, which stays as it is."""


@dataclass(frozen=True)
class Replacement(WeightDelta):
    """Another value in the weight's place: of it, `scale` times the difference."""

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

    def merge(self) -> Tensor:
        return self.value if self.scale == 1 else torch.lerp(self.weight, self.value, self.scale)
