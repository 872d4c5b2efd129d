"""Adapter directories, read for merging: the change that each makes to the base weights."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from os.path import lexists
from pathlib import Path
from typing import Any, ClassVar, Required

import peft
import torch
from diffusers import ModelMixin
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.adapters.deltas import Replacement, WeightDelta
from esd_peft.adapters.peft_config import (
    Patterns,
    fits_base_only,
    for_layers,
    multiplies,
    read_peft_config,
    targeted,
)
from esd_peft.adapters.peft_layers import MERGES_BIAS, LayerBias, LayerWeight, PeftFiles
from esd_peft.errors import UserError
from esd_peft.io.paths import is_file
from esd_peft.io.tensors import TensorFile, check_finite, open_tensors, read_tensors, sha256
from esd_peft.io.text import UnreadableError, read_json, read_yaml
from esd_peft.options.prompts import PromptOptions

WEIGHTS_FILE = "denoiser_weights.safetensors"  # of --adapter-type none: new values under the denoiser's names
_PEFT_PREFIX = "base_model.model."


# the fields read from an adapter's files, with their types; the files may have more
_BaseFile = TypedDict(
    "_BaseFile",
    {
        "model": str,
        "revision": str | None,
        "variant": str | None,
        "checkpoint_config": str | None,
        "class": str,
        "denoiser_sha256": dict[str, str],
        "files": dict[str, str],  # the adapter's own, with their hashes
    },
    total=False,
)


class _PretrainedFields(TypedDict, total=False):
    model: str
    resolution: int | None
    max_sequence_length: int | None


class _PromptsFields(TypedDict, total=False):
    concept: list[str | dict[str, Any]]
    erase_from: str | None
    preserve: list[str]


class _StudentFields(TypedDict, total=False):
    scope: str


class _ConfigFile(TypedDict, total=False):
    pretrained: _PretrainedFields
    prompts: Required[_PromptsFields]
    student: _StudentFields


class _RateFields(TypedDict):
    before: float
    after: float


class _ResultFile(TypedDict, total=False):
    concepts: dict[str, _RateFields]
    others: dict[str, _RateFields]


class Adapter(ABC):
    """A saved adapter directory; `base` and `config` are empty for adapters of other tools."""

    adds: ClassVar[bool]  # it adds to the base weight, also a quantized one; otherwise it replaces the weight

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        self.path, self.scale = path, scale
        self.base = _read_map(path / "base.json", read_json, _BaseFile)
        self.config = _read_map(self._as_saved("config.yaml"), read_yaml, _ConfigFile)
        self.result = _read_map(path / "result.json", read_json, _ResultFile)

    def _as_saved(self, name: str) -> Path:
        """Return the path of the adapter's file. Raises `UserError` if its hash is not the one in `base.json`."""
        path, expected = self.path / name, self.base.get("files", {}).get(name)
        if expected and is_file(path) and sha256(path) != expected:
            raise UserError(f"{path} is damaged: it is not what was saved; restore it, or remove base.json and name --base")
        return path

    @property
    def base_options(self) -> dict[str, Any]:
        """The options with which its base was read, without `allow_pickle`: an adapter may never enable pickles."""
        return {name: self.base.get(name) for name in ("variant", "revision", "checkpoint_config")}

    @property
    def concepts(self) -> list[str]:
        """The erased concepts; none for adapters of other tools."""
        prompts = self.config.get("prompts", {})
        if not prompts.get("concept"):
            return []
        return PromptOptions(concept=prompts["concept"], erase_from=prompts.get("erase_from")).concept_names

    @property
    def scope(self) -> str:
        """The scope of the trained layers; empty for adapters of other tools."""
        return str(self.config.get("student", {}).get("scope", ""))

    @property
    def config_sha256(self) -> str:
        """The hash of its `config.yaml`; empty for adapters of other tools."""
        return sha256(self.path / "config.yaml") if self.config else ""

    @abstractmethod
    def changes(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """Return the change of each weight of `denoiser`, which may be on the meta device.

        Raises `UserError` if the adapter does not fit.
        """

    def fitting(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """Return `changes` after applying one change of each kind to zeros, as a check before any work.

        Raises `UserError` if the adapter does not fit, holds nothing, or makes values that are no numbers.
        """
        changes = self.changes(denoiser)
        if not changes:
            raise UserError(f"--adapter {self.path} holds no tensors, so it changes nothing; restore its files")
        kinds = {(type(change), type(change.layer)): name for name, change in reversed(changes.items())}
        for name in kinds.values():
            change = changes[name]
            merged = change.on(torch.zeros(denoiser.get_parameter(name).shape)).merge()
            check_finite(f"--adapter {self.path}: {name}", merged)
        return changes

    def notes(self, denoiser: ModelMixin) -> list[str]:
        """Return sentences about parts that its files lack, if it can be used without them."""
        return []

    @torch.no_grad()
    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        """Merge the adapter into the weights of `denoiser` in place, rounding each once; quantized layers get it on top.

        Raises `UserError` as `changes` does.
        """
        weights = dict(denoiser.named_parameters())
        for name, change in self.changes(denoiser).items():
            weights[name].copy_(change.on(weights[name].detach()).merge())
        return denoiser


def read_adapter(path: Path, scale: float = 1.0) -> Adapter:
    """Open an adapter of `Student.save` or PEFT; `scale` multiplies its trained effect.

    Raises `UserError` if it is not there or damaged.
    """
    if is_file(path / WEIGHTS_FILE):
        return _SavedWeights(path, scale)
    if is_file(path / peft.utils.CONFIG_NAME):
        return _SavedPeft(path, scale)
    raise UserError(f"--adapter {path} is not an adapter directory: it has no {peft.utils.CONFIG_NAME}")


class _SavedPeft(Adapter):
    """An adapter of any PEFT method that can merge a Linear or Conv2d; PEFT merges one layer at a time."""

    adds: ClassVar[bool] = True

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        super().__init__(path, scale)
        config = read_peft_config(self._as_saved(peft.utils.CONFIG_NAME).parent)
        self.files = PeftFiles(path, config, Patterns(path), scale)
        tensors = read_tensors(self._as_saved(peft.utils.SAFETENSORS_WEIGHTS_NAME))
        # half-precision tensors compute in single precision, so nothing is rounded again
        self.tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def changes(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """Group the tensors by layer; tensors with names of the base's own (trained biases, `modules_to_save`) replace
        these.
        """
        modules, weights = dict(denoiser.named_modules()), dict(denoiser.named_parameters())
        changes_by_weight: dict[str, WeightDelta] = {}
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            name = key.removeprefix(_PEFT_PREFIX)
            own = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if own in weights:
                if weights[own].shape != value.shape:
                    raise UserError(f"--adapter {self.path} does not fit the base at {own}")
                changes_by_weight[own] = Replacement(functools.partial(self.tensors.__getitem__, key), self.scale)
                continue
            while name and not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
                name = name.rpartition(".")[0]
            if not name:
                raise UserError(
                    f"--adapter {self.path} does not fit the base, which has no layer for {key}, or is a {self.files.kind} "
                    "whose layers share weights, which is not merged here; merge it with peft"
                )
            groups.setdefault(name, {})[key] = value
        adds = not (fits_base_only(self.files.config) or multiplies(self.files.config))
        for name, tensors in groups.items():
            layer = modules[name]
            biased = layer.bias is not None and f"{name}.bias" not in changes_by_weight
            biased = biased and (self.files.kind in MERGES_BIAS or any(key.endswith("bias") for key in tensors))
            weight = LayerWeight(self.files, name, layer, tensors, biased, adds)
            changes_by_weight |= {f"{name}.weight": weight} | ({f"{name}.bias": LayerBias(weight)} if biased else {})
        return changes_by_weight

    def notes(self, denoiser: ModelMixin) -> list[str]:
        layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        named = targeted(self.files.config, layers, Patterns(self.path))
        changed = {name.rpartition(".")[0] for name in self.changes(denoiser)}
        if not (lacking := [name for name in named if name not in changed]):
            return []
        return [
            f"An adapter's file has no tensors for {len(lacking)} of the {len(named)} layers that its config names, "
            f"{lacking[0]} first; these stay as the base has them."
        ]

    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        if all(weight.is_floating_point() for weight in denoiser.parameters()):
            return super().apply(denoiser)
        names = [name.removesuffix(".weight") for name, change in self.changes(denoiser).items() if change.layer]
        with self.files.at("its quantized layers"):
            config = for_layers(self.files.config, names, self.files.patterns)
            return peft.PeftModel.from_pretrained(denoiser, self.path, config=config)


class _SavedWeights(Adapter):
    """The weights of `--adapter-type none`, which replace the base's."""

    adds: ClassVar[bool] = False

    def changes(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        saved = open_tensors(self._as_saved(WEIGHTS_FILE))
        shapes = {name: [*p.shape] for name, p in denoiser.named_parameters()}
        for name, entry in saved.entries.items():
            if shapes.get(name) != entry["shape"]:
                raise UserError(f"--adapter {self.path} does not fit the base at {name}")
        return {name: Replacement(functools.partial(_read, saved, name), self.scale) for name in saved.entries}


def _read(saved: TensorFile, name: str) -> Tensor:
    with saved.path.open("rb") as file:
        return saved.read(file, name)


def _read_map(path: Path, read: Callable[[Path], Any], kind: type) -> dict[str, Any]:
    if not lexists(path):
        return {}
    try:
        values: dict[str, Any] = read(path)
        TypeAdapter(kind).validate_python(values, strict=True)
    except UnreadableError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or remove it and name --base") from None
    except ValidationError:
        raise UserError(f"{path} is damaged; restore it, or remove it and name --base") from None
    return values
