"""Adapter directories, read back to be merged: how each changes the base weights."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isfile  # false for a name that is too long, where Path.is_file raises
from pathlib import Path
from typing import Any, ClassVar

import peft
import torch
from diffusers import ModelMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.adapters import WEIGHTS_FILE
from esd_peft.errors import UserError
from esd_peft.text_files import UnreadableError, read_json, read_yaml
from esd_peft.weights import TensorFile, open_tensors, read_tensors, sha256

_PEFT_PREFIX = "base_model.model."


# what is read of an adapter's files, with its type; they may hold more
_BaseFile = TypedDict(
    "_BaseFile",
    {
        "model": str | None,
        "revision": str | None,
        "variant": str | None,
        "checkpoint_config": str | None,
        "class": str,
        "denoiser_sha256": dict[str, str],
        "files": dict[str, str],  # the adapter's own, with their hashes
    },
    total=False,
)


class _ConfigFile(TypedDict, total=False):
    model: str | None
    scope: str


class _RateSaid(TypedDict):
    before: float
    after: float


class _ResultFile(TypedDict, total=False):
    concepts: dict[str, _RateSaid]
    others: dict[str, _RateSaid]


class Adapted(ABC):
    """One base weight with an adapter on it."""

    @abstractmethod
    def effect(self, inputs: Tensor) -> Tensor:
        """What the adapter adds to the layer's output for `inputs`, fp32; without a layer: to the weight."""

    @abstractmethod
    def merge(self) -> Tensor:
        """The merged weight, fp32. There is no adapter afterwards."""


class Change(ABC):
    """What an adapter does to one base weight."""

    layer: nn.Module | None  # that the weight belongs to, of the base's sizes; none: the weight is looked at by itself

    @abstractmethod
    def on(self, weight: Tensor) -> Adapted:
        """The adapter on that weight, which stays as it is."""


class Adapter(ABC):
    """A saved adapter directory; `base` and `config` are empty where another tool made it."""

    adds: ClassVar[bool]  # to whatever weight is there; otherwise it replaces the weight

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        self.path, self.scale = path, scale
        self.base = _read_map(path / "base.json", read_json, _BaseFile)
        self.config = _read_map(path / "config.yaml", read_yaml, _ConfigFile)
        self.result = _read_map(path / "result.json", read_json, _ResultFile)

    def _as_saved(self, name: str) -> Path:
        """The adapter's file. Raises `UserError` if its bits are not those that `base.json` knows."""
        path, known = self.path / name, self.base.get("files", {}).get(name)
        if known and isfile(path) and sha256(path) != known:
            raise UserError(f"{path} is damaged: it is not what was saved; restore it, or remove base.json and name --base")
        return path

    @property
    def config_sha256(self) -> str:
        """The hash of the config that made it; empty where another tool did."""
        return sha256(self.path / "config.yaml") if self.config else ""

    @abstractmethod
    def changes(self, denoiser: ModelMixin) -> dict[str, Change]:
        """For each weight of `denoiser` (which may be on the meta device) that changes, how.

        Raises `UserError` if the adapter does not fit.
        """

    @abstractmethod
    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        """The adapter on top of a loaded fp32 `denoiser`; an adapter that is there already is merged by PEFT first."""


def read_adapter(path: Path, scale: float = 1.0) -> Adapter:
    """Open what `Student.save`, or PEFT, wrote, to act `scale` times as much as trained.

    Raises `UserError` if it is not there or damaged.
    """
    if isfile(path / WEIGHTS_FILE):
        return _SavedWeights(path, scale)
    if isfile(path / peft.utils.CONFIG_NAME):
        return _SavedPeft(path, scale)
    raise UserError(f"--adapter {path} is not an adapter directory: it has no {peft.utils.CONFIG_NAME}")


class _SavedPeft(Adapter):
    """Merges any PEFT method that can merge a Linear or Conv2d: PEFT itself does it, on one layer at a time."""

    adds: ClassVar[bool] = True

    def __init__(self, path: Path, scale: float = 1.0) -> None:
        super().__init__(path, scale)
        try:
            read_json(path / peft.utils.CONFIG_NAME)
            self.peft = peft.PeftConfig.from_pretrained(path)
        except Exception as error:  # what PEFT raises for values it does not expect is of many kinds
            raise UserError(f"--adapter {path}: {peft.utils.CONFIG_NAME} is damaged ({error}); restore it") from None
        if self.peft.is_prompt_learning or getattr(self.peft, "megatron_config", None):  # would load a tokenizer, or code
            raise UserError(f"--adapter {path} does not change weights alone, as LoRA does; name one that does")
        self.tensors = read_tensors(self._as_saved(peft.utils.SAFETENSORS_WEIGHTS_NAME))

    def changes(self, denoiser: ModelMixin) -> dict[str, Change]:
        modules = dict(denoiser.named_modules())
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in self.tensors.items():
            name = key.removeprefix(_PEFT_PREFIX)
            while name and not isinstance(modules.get(name), nn.Linear | nn.Conv2d):
                name = name.rpartition(".")[0]
            if not name:
                raise UserError(f"--adapter {self.path} does not fit the base, which has no layer for {key}")
            groups.setdefault(name, {})[key] = value
        return {f"{name}.weight": _LayerChange(self, name, modules[name], tensors) for name, tensors in groups.items()}

    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        model = peft.PeftModel.from_pretrained(_plain(denoiser), self.path)
        _scale(model, self.scale)
        return model


@dataclass(frozen=True)
class _LayerChange(Change):
    adapter: _SavedPeft
    name: str
    layer: nn.Module
    tensors: dict[str, Tensor]

    def on(self, weight: Tensor) -> Adapted:
        """PEFT's layer around one of the base's kind with that weight, in fp32 and without a bias, which none changes."""
        layer = copy.deepcopy(self.layer).to_empty(device="cpu").float()
        layer.register_parameter("weight", nn.Parameter(weight.to(torch.float32, copy=True)))
        layer.register_parameter("bias", None)
        root = nn.Module()
        parent = root
        *path, last = self.name.split(".")
        for part in path:  # the same name as in the model: the config's rules may depend on it
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
        config = copy.deepcopy(self.adapter.peft)
        config.target_modules = [self.name]
        config.base_model_name_or_path = None
        try:
            wrapped = peft.get_peft_model(root, config)
            peft.set_peft_model_state_dict(wrapped, self.tensors)
            _scale(wrapped, self.adapter.scale)
            return _AdaptedLayer(root.get_submodule(self.name))
        except Exception as error:  # as for its config
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--adapter {self.adapter.path} does not fit the base at {self.name} ({reason})") from None


@dataclass(frozen=True)
class _AdaptedLayer(Adapted):
    layer: Any  # of PEFT

    def effect(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) - self.layer.base_layer(inputs)

    def merge(self) -> Tensor:
        self.layer.merge()
        return self.layer.base_layer.weight.detach()


class _SavedWeights(Adapter):
    """What `--adapter none` learned: whole weights, which replace the base's."""

    adds: ClassVar[bool] = False

    def changes(self, denoiser: ModelMixin) -> dict[str, Change]:
        saved = open_tensors(self._as_saved(WEIGHTS_FILE))
        shapes = {name: [*p.shape] for name, p in denoiser.named_parameters()}
        for name, entry in saved.entries.items():
            if shapes.get(name) != entry["shape"]:
                raise UserError(f"--adapter {self.path} does not fit the base at {name}")

        return {name: _WeightChange(self, name, saved) for name in saved.entries}

    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        denoiser = _plain(denoiser)
        weights = dict(denoiser.named_parameters())
        with torch.no_grad():
            for name, change in self.changes(denoiser).items():
                weights[name].copy_(change.on(weights[name].data).merge())
        return denoiser


@dataclass(frozen=True)
class _WeightChange(Change):
    adapter: _SavedWeights
    name: str
    saved: TensorFile
    layer: None = None

    def on(self, weight: Tensor) -> Adapted:
        with self.saved.path.open("rb") as file:
            return _AdaptedWeight(weight.float(), self.saved.read(file, self.name).float(), self.adapter.scale)


@dataclass(frozen=True)
class _AdaptedWeight(Adapted):
    weight: Tensor
    learned: Tensor
    scale: float

    def effect(self, inputs: Tensor) -> Tensor:
        return self.scale * (self.learned - self.weight)

    def merge(self) -> Tensor:
        return self.learned if self.scale == 1 else torch.lerp(self.weight, self.learned, self.scale)


def _scale(model: nn.Module, scale: float) -> None:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.scaling["default"] *= scale


def _plain(denoiser: nn.Module) -> nn.Module:
    return denoiser.merge_and_unload() if isinstance(denoiser, peft.PeftModel) else denoiser


def _read_map(path: Path, read: Callable[[Path], Any], kind: type) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = read(path)
        TypeAdapter(kind).validate_python(values, strict=True)
    except (UnreadableError, ValidationError):
        raise UserError(f"{path} is damaged; restore it, or remove it and name --base") from None
    return values
