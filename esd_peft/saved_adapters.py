"""Adapter directories, read back to be merged: how each changes the base weights."""

import copy
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import peft
import yaml
from diffusers import ModelMixin
from torch import Tensor, nn

from esd_peft.adapters import WEIGHTS_FILE
from esd_peft.errors import UserError
from esd_peft.weights import open_tensors, read_tensors

_PEFT_PREFIX = "base_model.model."
Change = Callable[[Tensor], Tensor]  # from a base weight, as stored, to the merged one in fp32


class Adapter(ABC):
    """A saved adapter directory; `base` and `config` are empty where another tool made it."""

    adds: ClassVar[bool]  # to whatever weight is there; otherwise it replaces the weight

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = _read_map(path / "base.json", json.loads)
        self.config = _read_map(path / "config.yaml", yaml.safe_load)

    @abstractmethod
    def changes(self, denoiser: ModelMixin) -> dict[str, Change]:
        """For each weight of `denoiser` (which may be on the meta device) that changes, how. One is worked out at a time.

        Raises `UserError` if the adapter does not fit.
        """

    @abstractmethod
    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        """The adapter on top of a loaded fp32 `denoiser`; an adapter that is there already is merged by PEFT first."""


def read_adapter(path: Path) -> Adapter:
    """Open what `Student.save`, or PEFT, wrote. Raises `UserError` if it is not there or damaged."""
    if (path / WEIGHTS_FILE).is_file():
        return _SavedWeights(path)
    if (path / peft.utils.CONFIG_NAME).is_file():
        return _SavedPeft(path)
    raise UserError(f"--adapter {path} is not an adapter directory: it has no {peft.utils.CONFIG_NAME}")


class _SavedPeft(Adapter):
    """Merges any PEFT method that can merge a Linear or Conv2d: PEFT itself does it, on one layer at a time."""

    adds: ClassVar[bool] = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.peft = peft.PeftConfig.from_pretrained(path)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"--adapter {path}: {peft.utils.CONFIG_NAME} is damaged ({error}); restore it") from None
        self.tensors = read_tensors(path / peft.utils.SAFETENSORS_WEIGHTS_NAME)

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
        return {
            f"{name}.weight": functools.partial(self._merged, name, modules[name], tensors)
            for name, tensors in groups.items()
        }

    def _merged(self, name: str, layer: nn.Module, tensors: dict[str, Tensor], weight: Tensor) -> Tensor:
        layer = copy.deepcopy(layer).to_empty(device="cpu").float()
        layer.register_parameter("weight", nn.Parameter(weight.float()))
        root = nn.Module()
        parent = root
        *path, last = name.split(".")
        for part in path:  # the same name as in the model: the config's rules may depend on it
            parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
        config = copy.deepcopy(self.peft)
        config.target_modules = [name]
        config.base_model_name_or_path = None
        try:
            wrapped = peft.get_peft_model(root, config)
            peft.set_peft_model_state_dict(wrapped, tensors)
            merged: Any = root.get_submodule(name)
            merged.merge()
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--adapter {self.path} does not fit the base at {name} ({reason})") from None
        return merged.base_layer.weight.detach()

    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        return peft.PeftModel.from_pretrained(_plain(denoiser), self.path)


class _SavedWeights(Adapter):
    """What `--adapter none` learned: whole weights, which replace the base's."""

    adds: ClassVar[bool] = False

    def changes(self, denoiser: ModelMixin) -> dict[str, Change]:
        saved = open_tensors(self.path / WEIGHTS_FILE)
        shapes = {name: [*p.shape] for name, p in denoiser.named_parameters()}
        for name, entry in saved.entries.items():
            if shapes.get(name) != entry["shape"]:
                raise UserError(f"--adapter {self.path} does not fit the base at {name}")

        def replaced(name: str, _weight: Tensor) -> Tensor:
            with saved.path.open("rb") as file:
                return saved.read(file, name)

        return {name: functools.partial(replaced, name) for name in saved.entries}

    def apply(self, denoiser: ModelMixin) -> ModelMixin:
        denoiser = _plain(denoiser)
        denoiser.load_state_dict(read_tensors(self.path / WEIGHTS_FILE), strict=False)
        return denoiser


def _plain(denoiser: nn.Module) -> nn.Module:
    return denoiser.merge_and_unload() if isinstance(denoiser, peft.PeftModel) else denoiser


def _read_map(path: Path, parser: Callable[[str], Any]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parser(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged; restore it, or remove it and name --base")
    return values
