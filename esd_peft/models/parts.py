"""One part of a pipeline directory: its class, whether its files hold all of it, and the part itself.

Whatever a library raises about a part becomes one sentence here, by `reading`.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from esd_peft.errors import UserError, in_brief
from esd_peft.io.tensors import DTYPES, check_finite, find_weights
from esd_peft.io.text import UnreadableError, read_json

_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# what wrappers leave in the names of weights that were saved from within them
_WRAPPERS = {r"(^|\.)_orig_mod\.": "torch.compile", r"^module\.": "a parallel wrapper", r"\.base_layer\.": "a LoRA"}
# numbers in a config that would take hours or all memory before anything is compared with the files
_LARGEST = {"layers": 1000, "sample_size": 4096, "pos_embed_max_size": 4096, "": 2**20}


@contextlib.contextmanager
def reading(place: str, fix: str = "restore its files") -> Iterator[None]:
    """Whatever the libraries raise within it, which is many kinds, is a `UserError` about `place`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{place} needs a package that is not here ({in_brief(error)}); install it") from None
    except Exception as error:
        raise UserError(f"{place} cannot be loaded ({in_brief(error)}); {fix}") from None


@dataclass(frozen=True)
class Part:
    """The part `name` of the pipeline in `path`; `entry` is what its `model_index.json` says of it."""

    path: Path
    name: str
    entry: Any
    option: str
    variant: str | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.option} {self.path}: its {self.name}"

    @property
    def family(self) -> Any:
        """Raises `UserError` unless it is a class of diffusers or transformers: other modules could be anybody's code."""
        library, name = self.entry if isinstance(self.entry, list) else (None, None)
        found = getattr(_LIBRARIES.get(str(library)), str(name), None)
        if not (isinstance(found, type) and hasattr(found, "from_pretrained")):
            raise UserError(f"{self.place} is no class of diffusers or transformers; restore model_index.json")
        return found

    @property
    def has_weights(self) -> bool:
        """Tokenizers, the processors they are part of, and schedulers have none."""
        return not re.search("Tokenizer|Processor|Scheduler", self.family.__name__)

    def config(self) -> dict[str, Any]:
        """As stored."""
        with reading(self.place):
            return {**read_json(self.path / self.name / "config.json")}

    def load(self, dtype: torch.dtype) -> Any:
        """The part, on the CPU, its weights from safetensors only. Raises `UserError` for weights that are no numbers."""
        family, options = self.family, dict[str, Any]()
        if self.has_weights:
            variant = find_weights(self.path / self.name, self.variant).variant
            options = {"dtype": dtype, "use_safetensors": True, "variant": variant}
        if family.__module__.startswith("transformers."):
            options["trust_remote_code"] = False
        with reading(self.place):
            made = family.from_pretrained(self.path, subfolder=self.name, local_files_only=True, **options)
        if isinstance(made, nn.Module):
            for name, value in made.state_dict().items():
                check_finite(f"{self.place}: {name}", value)
        return made

    def empty(self, dtype: torch.dtype = torch.float32, buffers: bool = False) -> Any:
        """Its structure on the meta device, without weights; buffers may be real, as no file has all of them."""
        family = self.family
        with reading(self.place):
            with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
                if issubclass(family, ModelMixin):
                    made = family.from_config(family.load_config(self.path, subfolder=self.name))
                else:
                    made = family(self._text_config())
            # What a config calls its dtype, transformers gives to models within the model, but not to what is around them.
            if dtype != torch.float32 or not isinstance(made, ModelMixin):
                made = made.to(dtype)
            return made.requires_grad_(False).eval()

    def _text_config(self) -> Any:
        found = self.family.config_class
        return found.from_pretrained(self.path, subfolder=self.name, local_files_only=True, trust_remote_code=False)

    def check_config(self) -> None:
        """Raise `UserError` for a config that is no map, or asks for more than any model has."""
        named = "scheduler_config.json" if "Scheduler" in self.family.__name__ else "config.json"
        try:
            values = read_json(self.path / self.name / named)
            if not isinstance(values, dict):
                raise UnreadableError("it is no map")
        except UnreadableError as error:
            raise UserError(f"{self.place} cannot be loaded ({named}: {error}); restore its files") from None
        for key, value in _numbers(values, ""):
            most = next(most for word, most in _LARGEST.items() if word in key)
            if abs(value) > most:
                raise UserError(f"{self.place} cannot be loaded ({named}: {key} is {value:.4g}); restore that file")

    def check_weights(self, merged: bool) -> None:
        """Raise `UserError` unless the files hold what the part consists of, by name and shape; reads headers only.

        Names that another version of the libraries gave are as good. With `merged`, the weights are changed too, so they
        must be stored as numbers of 16 bits or more.
        """
        config = self.config()
        if "quantization_config" in config and merged:
            raise UserError(f"{self.place} is quantized (see its config.json), too coarse to erase from; name the original")
        stored = self._stored(merged)
        if "quantization_config" in config:
            return
        with reading(self.place), _quiet():
            find = _compare_diffusers if issubclass(self.family, ModelMixin) else _compare_transformers
            missing, unexpected, shapes = find(self, stored)
        wrapped = [(name, tool) for name in unexpected for mark, tool in _WRAPPERS.items() if re.search(mark, name)]
        if missing and wrapped:
            name, tool = wrapped[0]
            raise UserError(
                f"{self.place} was saved from within {tool}, as the name {name} shows; unwrap it and save it again"
            )
        if missing:
            raise UserError(f"{self.place} lacks weights, {missing[0]} first of {len(missing)}; restore its files")
        if unexpected:
            raise UserError(
                f"{self.place} has weights, {unexpected[0]} first, that its config.json does not know; restore it"
            )
        if shapes:
            raise UserError(f"{self.place} does not fit its config.json: {shapes[0]}; restore its files")

    def _stored(self, merged: bool) -> dict[str, Tensor]:
        """What lies in its files, as tensors without values."""
        found = {}
        for path in find_weights(self.path / self.name, self.variant).files:
            with reading(self.place, f"restore its {path.name}"), safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    if merged and kind not in DTYPES and "8" in kind:
                        raise UserError(f"{self.place} stores {name} as {kind}, too coarse to erase from; use 16 or 32 bits")
                    found[name] = torch.empty(part.get_shape(), device="meta", dtype=DTYPES.get(kind, torch.float32))
        return found


Comparison = tuple[list[str], list[str], list[str]]  # names that are missing, those that are too many, shapes that differ


def _compare_diffusers(part: Part, stored: dict[str, Tensor]) -> Comparison:
    model = part.empty()
    model._fix_state_dict_keys_on_load(stored)  # attention of files from before diffusers 0.17
    wanted = model.state_dict()
    shapes = [
        f"{name} is {[*stored[name].shape]}, not {[*value.shape]}"
        for name, value in wanted.items()
        if name in stored and stored[name].shape != value.shape
    ]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unexpected = [name for name in stored if name not in wanted and not any(re.search(i, name) for i in ignored)]
    return [name for name in wanted if name not in stored], _in_structure(model, unexpected), shapes


def _compare_transformers(part: Part, stored: dict[str, Tensor]) -> Comparison:
    """By the library itself, which knows what else its classes' weights have been called: it loads nothing on to nowhere."""
    model, found = part.family.from_pretrained(
        None,
        config=part._text_config(),
        state_dict=stored,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
    )
    shapes = [f"{name} is {[*here]}, not {[*wanted]}" for name, here, wanted in sorted(found["mismatched_keys"])]
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    missing = [name for name in sorted(found["missing_keys"]) if name not in mismatched]
    return missing, _in_structure(model, sorted(found["unexpected_keys"])), shapes


def _in_structure(model: nn.Module, names: list[str]) -> list[str]:
    """Those of modules that the model has. A head beside it, and buffers that are not saved any more, may be."""
    modules, buffers = dict(model.named_children()), dict(model.named_buffers())
    wrapped = "|".join(_WRAPPERS)
    return [n for n in names if n not in buffers and (n.split(".")[0] in modules or re.search(wrapped, n))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report and bar: what they say is said in a sentence."""
    level, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()


def _numbers(value: Any, key: str) -> Iterator[tuple[str, int]]:
    """The whole numbers anywhere in a config, with the names of their fields."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int):
        yield key, value
