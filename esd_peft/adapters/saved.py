"""Adapter directories, read back to be merged: how each changes the base weights."""

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

WEIGHTS_FILE = "denoiser_weights.safetensors"  # of --adapter-type none: the new values under the denoiser's own names
_PEFT_PREFIX = "base_model.model."


# what is read of an adapter's files, with its type; they may hold more
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


class _PretrainedSaid(TypedDict, total=False):
    model: str
    resolution: int | None
    max_sequence_length: int | None


class _PromptsSaid(TypedDict, total=False):
    concept: list[str | dict[str, Any]]
    erase_from: str | None
    preserve: list[str]


class _StudentSaid(TypedDict, total=False):
    scope: str


class _ConfigFile(TypedDict, total=False):
    pretrained: _PretrainedSaid
    prompts: Required[_PromptsSaid]
    student: _StudentSaid


class _RateSaid(TypedDict):
    before: float
    after: float


class _ResultFile(TypedDict, total=False):
    concepts: dict[str, _RateSaid]
    others: dict[str, _RateSaid]


class Adapter(ABC):
    """A saved adapter directory; `base` and `config` are empty where another tool made it."""

    adds: ClassVar[bool]  # to whatever weight is there, a quantized one too; otherwise it replaces the weight

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        self.path, self.scale = path, scale
        self.base = _read_map(path / "base.json", read_json, _BaseFile)
        self.config = _read_map(self._as_saved("config.yaml"), read_yaml, _ConfigFile)
        self.result = _read_map(path / "result.json", read_json, _ResultFile)

    def _as_saved(self, name: str) -> Path:
        """The adapter's file. Raises `UserError` if its bits are not those that `base.json` knows."""
        path, known = self.path / name, self.base.get("files", {}).get(name)
        if known and is_file(path) and sha256(path) != known:
            raise UserError(f"{path} is damaged: it is not what was saved; restore it, or remove base.json and name --base")
        return path

    @property
    def base_options(self) -> dict[str, Any]:
        """How its base was read, but for pickles: these never on an adapter's word."""
        return {name: self.base.get(name) for name in ("variant", "revision", "checkpoint_config")}

    @property
    def concepts(self) -> list[str]:
        """The concepts that it erases; none where another tool made it."""
        said = self.config.get("prompts", {})
        if not said.get("concept"):
            return []
        return PromptOptions(concept=said["concept"], erase_from=said.get("erase_from")).concept_names

    @property
    def scope(self) -> str:
        """Which layers learned; empty where another tool made it."""
        return str(self.config.get("student", {}).get("scope", ""))

    @property
    def config_sha256(self) -> str:
        """The hash of the config that made it; empty where another tool did."""
        return sha256(self.path / "config.yaml") if self.config else ""

    @abstractmethod
    def changes(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """For each weight of `denoiser` (which may be on the meta device) that changes, how.

        Raises `UserError` if the adapter does not fit.
        """

    def fitting(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """`changes`, after the first of each kind was tried on a weight of zeros: before any work.

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
        """Sentences about what is missing in its files, though it can be used without."""
        return []

    @torch.no_grad()
    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        """The loaded `denoiser` with the adapter merged into its weights, in place, each rounded once; quantized layers get
        it on top. Raises `UserError` as `changes` does.
        """
        weights = dict(denoiser.named_parameters())
        for name, change in self.changes(denoiser).items():
            weights[name].copy_(change.on(weights[name].detach()).merge())
        return denoiser


def read_adapter(path: Path, scale: float = 1.0) -> Adapter:
    """Open what `Student.save`, or PEFT, wrote, to act `scale` times as much as trained.

    Raises `UserError` if it is not there or damaged.
    """
    if is_file(path / WEIGHTS_FILE):
        return _SavedWeights(path, scale)
    if is_file(path / peft.utils.CONFIG_NAME):
        return _SavedPeft(path, scale)
    raise UserError(f"--adapter {path} is not an adapter directory: it has no {peft.utils.CONFIG_NAME}")


class _SavedPeft(Adapter):
    """Merges any PEFT method that can merge a Linear or Conv2d: PEFT itself does it, on one layer at a time."""

    adds: ClassVar[bool] = True

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        super().__init__(path, scale)
        config = read_peft_config(self._as_saved(peft.utils.CONFIG_NAME).parent)
        self.files = PeftFiles(path, config, Patterns(path), scale)
        tensors = read_tensors(self._as_saved(peft.utils.SAFETENSORS_WEIGHTS_NAME))
        # what was stored in half precision computes in single: the file's rounding is all there is
        self.tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    def changes(self, denoiser: ModelMixin) -> dict[str, WeightDelta]:
        """By layers; tensors named as the base's own (trained biases, `modules_to_save`) take their place."""
        modules, weights = dict(denoiser.named_modules()), dict(denoiser.named_parameters())
        found: dict[str, WeightDelta] = {}
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            name = key.removeprefix(_PEFT_PREFIX)
            own = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if own in weights:
                if weights[own].shape != value.shape:
                    raise UserError(f"--adapter {self.path} does not fit the base at {own}")
                found[own] = Replacement(functools.partial(self.tensors.__getitem__, key), self.scale)
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
            biased = layer.bias is not None and f"{name}.bias" not in found
            biased = biased and (self.files.kind in MERGES_BIAS or any(key.endswith("bias") for key in tensors))
            weight = LayerWeight(self.files, name, layer, tensors, biased, adds)
            found |= {f"{name}.weight": weight} | ({f"{name}.bias": LayerBias(weight)} if biased else {})
        return found

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
    """What `--adapter-type none` learned: whole weights, which replace the base's."""

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
