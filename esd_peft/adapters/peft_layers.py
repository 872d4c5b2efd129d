"""PEFT's own layer around one layer of the base: its contribution, and its merged weight.

This merges a model of any size in the memory of its largest layer. It supports every PEFT method that can merge a single
Linear or Conv2d.
"""

import contextlib
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from esd_peft.adapters.deltas import AdaptedWeight, WeightDelta
from esd_peft.adapters.low_rank import low_rank
from esd_peft.adapters.peft_config import REPEATED, Patterns, for_layers
from esd_peft.errors import UserError, one_line

_NOT_SAVED = r"\bbase_layer\b|\branknum\b"  # the base's, and how many ranks AdaLoRA has left, which its tensors show
MERGES_BIAS = ("IA3", "ROAD", "BEFT")  # methods that change the bias of a layer without a tensor of that name


@dataclass(frozen=True)
class PeftFiles:
    """An adapter as it was read: directory, config, patterns, and scale."""

    path: Path
    config: peft.PeftConfig
    patterns: Patterns
    scale: float

    @property
    def kind(self) -> str:
        """PEFT's name of the method."""
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @contextlib.contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Turn every exception that PEFT raises for the layer `name` into a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            problem = f"does not fit the base at {name}, or cannot be merged ({one_line(error)})"
            raise UserError(f"--adapter {self.path}: its {self.kind} {problem}") from None


@dataclass(frozen=True)
class LayerWeight(WeightDelta):
    """The weight of an adapted layer."""

    files: PeftFiles
    name: str
    layer: Any  # Linear or Conv2d
    tensors: dict[str, Tensor]
    changes_bias: bool
    adds: bool

    def on(self, weight: Tensor) -> AdaptedWeight:
        if self.files.kind == "LORA" and isinstance(self.layer, nn.Linear) and not _changes_base(self.files.config):
            zero = torch.zeros(())  # PEFT puts the adapter where its layer is, so that it cannot be on the meta device
            values = zero.expand(weight.shape), None if self.layer.bias is None else zero.expand(len(weight))
            with self.files.at(self.name):
                plain = low_rank(self.wrapped(*values), weight, self.files.scale)
            if plain:
                return plain
        bias = None if self.layer.bias is None else torch.ones(len(weight))
        given = weight.to(torch.float32, copy=True), None if bias is None else bias.clone()
        return _AdaptedWeight(self, weight.float(), bias, self.wrapped(*given))

    def plain(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Return a layer of the base's kind with these values, fp32."""
        layer = copy.deepcopy(self.layer).to("meta").requires_grad_(False)
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)
        layer.bias = None if bias is None else nn.Parameter(bias.float(), requires_grad=False)
        return layer

    def wrapped(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Return PEFT's layer around these fp32 values, which a merge changes in place, in eval mode.

        Raises `UserError` if the adapter does not fit, or has unused tensors.
        """
        root = nn.Module()
        parent = root
        *path, last = self.name.split(".")
        for part in path:  # the name in the model, which PEFT looks up
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, self.plain(weight, bias))
        with self.files.at(self.name):
            config = for_layers(self.files.config, [self.name], self.files.patterns)
            # on the meta device, so that the config allocates no memory; the file provides the tensors
            empty = not _changes_base(config)
            if not empty:
                _check_rank(config, self.tensors)
            model = peft.get_peft_model(root, config, low_cpu_mem_usage=empty)
            result = peft.set_peft_model_state_dict(model, self.tensors, low_cpu_mem_usage=empty)
            if result.unexpected_keys:
                raise ValueError(f"there is no use for {result.unexpected_keys[0]}")
            missing = [name for name, value in model.named_parameters() if value.is_meta]
            unread = [name for name in result.missing_keys if not re.search(_NOT_SAVED, name)]
            if missing := missing or unread:
                raise ValueError(f"there is no {missing[0]}")
            return model.eval().get_submodule(f"base_model.model.{self.name}")

    def merged(self, layer: Any) -> Any:
        """Return PEFT's merged layer, a Linear or Conv2d."""
        with self.files.at(self.name):
            layer.merge()
            base = layer.get_base_layer()
            if not all(value.isfinite().all() for value in base.parameters()):
                raise ValueError("there are NaN or infinite values in it")
            return base


@dataclass(frozen=True)
class LayerBias(WeightDelta):
    """The bias of an adapted layer. Methods whose bias depends on the weight are refused."""

    of: LayerWeight
    layer: None = None

    @property
    def adds(self) -> bool:  # type: ignore[override]
        return self.of.adds

    def on(self, weight: Tensor) -> AdaptedWeight:
        shape = self.of.layer.weight.shape
        rows = torch.linspace(1, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        layers = (self.of.wrapped(value.clone(), weight.to(torch.float32, copy=True)) for value in (rows, rows.flip(0)))
        return _AdaptedBias(self.of, weight.float(), *layers)


@dataclass(frozen=True)
class _AdaptedWeight(AdaptedWeight):
    change: LayerWeight
    weight: Tensor
    bias: Tensor | None  # that the layer was given, to see whether it stays
    layer: Any  # of PEFT

    def effect(self, inputs: Tensor) -> Tensor:
        """Return the contribution through the weight, without any bias: the response to zeros is subtracted."""
        with self.change.files.at(self.change.name):
            answer = self.layer(inputs) - self.layer(torch.zeros_like(inputs))
        return self.change.files.scale * (answer - self.change.plain(self.weight, None)(inputs))

    def merge(self, dtype: torch.dtype = torch.float32) -> Tensor:
        merged = self.change.merged(self.layer)
        if self.bias is not None and not self.change.changes_bias and not torch.equal(merged.bias, self.bias):
            raise _entangled(self.change)
        return _part(self.weight, merged.weight, self.change.files.scale).to(dtype)


@dataclass(frozen=True)
class _AdaptedBias(AdaptedWeight):
    change: LayerWeight
    bias: Tensor
    layer: Any  # of PEFT
    other: Any  # the same, with another weight

    def effect(self, inputs: Tensor) -> Tensor:
        rows = self.change.layer.weight.shape[1:]
        zeros = torch.zeros(1, *rows) if len(rows) == 1 else torch.zeros(1, self.change.layer.in_channels, *rows[1:])
        with self.change.files.at(self.change.name):
            answer = self.layer(zeros)
        return self.change.files.scale * (answer.reshape(1, len(self.bias), -1)[0, :, 0] - self.bias)

    def merge(self, dtype: torch.dtype = torch.float32) -> Tensor:
        bias, other = (self.change.merged(layer).bias for layer in (self.layer, self.other))
        if not torch.equal(bias, other):
            raise _entangled(self.change)
        return _part(self.bias, bias, self.change.files.scale).to(dtype)


def _changes_base(config: peft.PeftConfig) -> bool:
    """Return whether PEFT takes the initial adapter off the base weight, which it repeats when it reads a file."""
    return getattr(config, "init_lora_weights", None) in REPEATED


def _check_rank(config: peft.PeftConfig, tensors: dict[str, Tensor]) -> None:
    """Check the rank of a layer whose tensors PEFT creates before it reads them. Raises `ValueError`."""
    (rank,) = {len(value) for key, value in tensors.items() if "lora_A" in key}
    if next(iter((config.rank_pattern or {}).values()), config.r) != rank:
        raise ValueError(f"its rank is not {rank}")


def _part(base: Tensor, merged: Tensor, scale: float) -> Tensor:
    return merged if scale == 1 else torch.lerp(base, merged, scale)


def _entangled(change: LayerWeight) -> UserError:
    return UserError(
        f"--adapter {change.files.path}: {change.files.kind} changes the bias of {change.name} together with its weight, "
        "which is not merged here; merge it with peft"
    )
