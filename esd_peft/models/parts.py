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

from esd_peft.errors import UserError, one_line
from esd_peft.io.tensors import DTYPES, check_finite, is_scale, is_unscaled
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.weight_files import StoredWeights, library_of, needed_weights

# safetensors' names of dtypes, and PyTorch's
_KINDS = DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
_LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# prefixes of wrappers in the names of saved weights
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
        raise UserError(f"{place} needs a package that is not here ({one_line(error)}); install it") from None
    except Exception as error:
        raise UserError(f"{place} cannot be loaded ({one_line(error)}); {fix}") from None


@dataclass(frozen=True)
class Part:
    """The part `name` of the pipeline in `path`; `entry` is its entry in `model_index.json`."""

    path: Path
    name: str
    entry: Any
    option: str
    variant: str | None = None

    @property
    def place(self) -> str:
        """The location of the part, for messages."""
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

    @property
    def weights(self) -> StoredWeights:
        """The files that hold its weights. Raises `UserError` if there are none."""
        return needed_weights(self.path / self.name, library_of(self.entry), self.variant)

    def config(self) -> dict[str, Any]:
        """The stored config."""
        with reading(self.place):
            return {**read_json(self.path / self.name / "config.json")}

    def load(self, dtype: torch.dtype) -> Any:
        """The part, on the CPU, its weights from safetensors only. Raises `UserError` for weights that are no numbers."""
        family, options = self.family, dict[str, Any]()
        if self.has_weights:
            options = {"dtype": dtype, "use_safetensors": True, "variant": self.weights.variant}
        if family.__module__.startswith("transformers."):
            options["trust_remote_code"] = False
        with reading(self.place):
            part_object = family.from_pretrained(self.path / self.name, local_files_only=True, **options)
        if isinstance(part_object, nn.Module):
            if getattr(part_object, "is_quantized", False):  # unquantized weights keep their stored dtype
                for value in part_object.parameters():
                    value.data = value.data.to(dtype) if value.is_floating_point() else value.data
            for name, value in part_object.state_dict().items():
                check_finite(f"{self.place}: {name}", value)
        return part_object

    def empty(self, dtype: torch.dtype = torch.float32, buffers: bool = False) -> Any:
        """Return the structure on the meta device, without weights; buffers may be real, since no file has all of them."""
        family = self.family
        with reading(self.place):
            with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
                if issubclass(family, ModelMixin):
                    part_object = family.from_config(family.load_config(self.path, subfolder=self.name))
                else:
                    part_object = family(self._text_config())
            # transformers applies a config's dtype to nested models, but not to the layers around them.
            if dtype != torch.float32 or not isinstance(part_object, ModelMixin):
                part_object = part_object.to(dtype)
            return part_object.requires_grad_(False).eval()

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
        stored = self._stored()
        if "quantization_config" in config:
            if all(is_unscaled(value.dtype, name) for name, value in stored.items()):
                raise UserError(
                    f"{self.place} holds weights that are not quantized, though its config.json has a quantization_config; "
                    "remove that from it"
                )
            return
        with reading(self.place), _quiet():
            model, missing, unexpected, shapes = _compare(self, stored)
        self._check_kinds(model, stored, merged)
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

    def _check_kinds(self, model: nn.Module, stored: dict[str, Tensor], merged: bool) -> None:
        """Raise `UserError` for weights that are not stored as values, or with `merged` too coarsely.

        Buffers may be whole numbers: positions, counts.
        """
        buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
        for name, value in stored.items():
            if name.rpartition(".")[2] in buffers or is_unscaled(value.dtype, name):
                continue
            kind = next(kind for kind, dtype in _KINDS.items() if dtype == value.dtype)
            if is_scale(name) or not value.dtype.is_floating_point:
                raise UserError(f"{self.place} stores {name} as {kind}, which is no weight; use 16 or 32 bits")
            if merged:
                raise UserError(f"{self.place} stores {name} as {kind}, too coarse to erase from; use 16 or 32 bits")

    def check_values(self) -> None:
        """Raise `UserError` for a NaN or infinity in the files of a part that may never be loaded."""
        for path in self.weights.files:
            with reading(self.place, f"restore its {path.name}"), safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    check_finite(f"{self.place}: {name}", file.get_tensor(name))

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors of its files, without values."""
        stored = {}
        for path in self.weights.files:
            with reading(self.place, f"restore its {path.name}"), safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    kind = _KINDS.get(part.get_dtype())
                    if kind is None:
                        raise UserError(f"{self.place} stores {name} as {part.get_dtype()}; use 16 or 32 bits")
                    stored[name] = torch.empty(part.get_shape(), device="meta", dtype=kind)
        return stored


# the model, names that are missing, those that are too many, shapes that differ
Comparison = tuple[nn.Module, list[str], list[str], list[str]]


def _compare(part: Part, stored: dict[str, Tensor]) -> Comparison:
    return (_compare_diffusers if issubclass(part.family, ModelMixin) else _compare_transformers)(part, stored)


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
    return model, [name for name in wanted if name not in stored], _in_structure(model, unexpected), shapes


def _compare_transformers(part: Part, stored: dict[str, Tensor]) -> Comparison:
    """Compare by transformers' own loader, which knows former names of weights, on the meta device."""
    model, found = part.family.from_pretrained(
        None,
        config=part._text_config(),
        state_dict=stored,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
    )
    shapes = [f"{name} is {[*here]}, not {[*wanted]}" for name, here, wanted in sorted(found["mismatched_keys"])]
    mismatched = {name for name, *_ in found["mismatched_keys"]} | _head(model)
    missing = [name for name in sorted(found["missing_keys"]) if name not in mismatched]
    return model, missing, _in_structure(model, sorted(found["unexpected_keys"])), shapes


def _head(model: nn.Module) -> set[str]:
    """The weights of a language model's head: prompts are encoded by the layers below it, so a file may lack it."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # of a transformers model
    inner = {name for name, module in model.named_modules() if head is not None and module is head}
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in inner}


def _in_structure(model: nn.Module, names: list[str]) -> list[str]:
    """Return the names that belong to modules of the model. Its files may also have a head, and buffers that are no longer
    saved.
    """
    modules, buffers = dict(model.named_children()), dict(model.named_buffers())
    wrapped = "|".join(_WRAPPERS)
    return [n for n in names if n not in buffers and (n.split(".")[0] in modules or re.search(wrapped, n))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' report and progress bar; problems are reported as one sentence."""
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
