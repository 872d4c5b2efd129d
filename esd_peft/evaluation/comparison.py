"""The two models that an evaluation compares."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft.utils import CONFIG_NAME
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.adapters.merge import RECORD
from esd_peft.adapters.saved import Adapter, read_adapter
from esd_peft.errors import UserError
from esd_peft.io.paths import is_file
from esd_peft.io.tensors import sha256
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models import ModelFamily, open_family
from esd_peft.models.conversion import INDEX
from esd_peft.models.pipeline_files import part_files, parts_of
from esd_peft.models.quantize import load_quantized, stay_packed
from esd_peft.options.base import flag
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.options.model import DrawingOptions, ModelOptions
from esd_peft.worlds import WORLDS


@dataclass(frozen=True)
class Model:
    """A pipeline directory, with or without an adapter on its denoiser."""

    family: ModelFamily
    adapter: Adapter | None = None

    def denoiser(self, device: torch.device, dtype: torch.dtype, quantize: str = "none") -> ModelMixin:
        """Load the denoiser; an adapter is merged into it, or lies on quantized layers.

        Raises `UserError` for whole weights (`--adapter-type none`) on a quantized base.
        """
        if quantize == "none":
            denoiser = self.family.load_denoiser(dtype)
        elif self.adapter is not None and not self.adapter.adds:
            raise UserError(
                f"--quantize {quantize} does not work with the whole weights in {self.adapter.path}; merge them first"
            )
        else:
            denoiser = load_quantized(self.family, quantize, dtype, device)
        if self.adapter is not None:
            with _named_erased():
                denoiser = self.adapter.apply(denoiser)
            if quantize == "nf4":
                stay_packed(denoiser)
        return denoiser.to(device)

    def pipeline(self, device: torch.device, dtype: torch.dtype, quantize: str) -> DiffusionPipeline:
        """Return the diffusers pipeline around it. Raises `UserError` as `denoiser` does."""
        return self.family.pipeline(self.denoiser(device, dtype, quantize), device, dtype)

    def fingerprint(self) -> dict[str, str]:
        """Return hashes of all files that images depend on: weights, configs, tokenizers, scheduler, adapter."""
        root, files = self.family.path, list[Path]()
        for name in parts_of(self.family):
            settings, weights = part_files(self.family, name)
            files += [*settings, *(weights.files if weights else ())]
        hashes = {str(path.relative_to(root)): sha256(path) for path in [root / INDEX, *files]}
        if self.adapter is not None:
            own = [*sorted(self.adapter.path.glob("*.safetensors")), self.adapter.path / CONFIG_NAME]
            hashes |= {f"adapter/{path.name}": sha256(path) for path in own if is_file(path)}
        return hashes


@dataclass(frozen=True)
class Comparison:
    """The models before and after erasure, and what was erased."""

    base: Model
    erased: Model
    concepts: list[str]
    notes: list[str]
    preserved: list[str]  # the erasure's preservation prompts
    drawing: DrawingOptions  # of both models: those of the options, otherwise those of training
    trained_on: str  # the base named by the adapter or the merged pipeline's record


def open_models(config: EvaluateConfig) -> Comparison:
    """Open the models of `--base` and `--erased`. Loads no denoiser. Raises `UserError` if one cannot be opened."""
    if is_file(config.erased / "model_index.json"):
        record = _read_record(config.erased / RECORD)
        base = config.base if config.base is not None else _trained_on(record.get("configs", []))
        if base is None:
            raise UserError(f"--base is missing, and --erased {config.erased} does not say what it was made from")
        if config.base is None and base not in WORLDS and "/" not in base:  # no hub id: a record names no local paths
            raise UserError(
                f"--base is missing: --erased {config.erased} was made from a directory {base}; name where it is"
            )
        erased, notes = Model(open_family(str(config.erased), "--erased")), []
        concepts, configs = record.get("concept", []), record.get("configs", [])
        before = open_family(base, "--base")
        _check_alike(before, erased.family)
    else:
        with _named_erased():
            adapter = read_adapter(config.erased)
        base = config.base if config.base is not None else adapter.base.get("model")
        if base is None:
            raise UserError(f"--base is missing, and --erased {config.erased} does not say what it was trained on")
        before = open_family(base, "--base", ModelOptions(**adapter.base_options) if config.base is None else None)
        with _named_erased():
            adapter.fitting(before.empty_denoiser())  # now, rather than after the base's images
        erased, notes = Model(before, adapter), _notes(before, adapter)
        concepts, configs = adapter.concepts, [adapter.config]
    if config.base is not None and Path(config.base).resolve() == config.erased.resolve():
        raise UserError(f"--base and --erased are the same directory, {config.base}; name the pipeline before erasing")
    drawing, drawing_notes = _drawing(config, configs, before)
    for family in (before, erased.family):
        family.draw_at(drawing)
    concepts, notes = config.concept or concepts, notes + drawing_notes
    return Comparison(Model(before), erased, concepts, notes, _preserved(configs), drawing, base)


def _drawing(config: EvaluateConfig, configs: list[dict[str, Any]], family: ModelFamily) -> tuple[DrawingOptions, list[str]]:
    """Return the settings with which both models draw, and notes on them.

    A concept that is gone at one resolution or prompt length may appear at another. Options left out are those of training,
    if all adapters agree.
    """
    trained, notes = [_drawn(config, group) for one in configs if isinstance(group := one.get("pretrained"), dict)], []
    used = config.drawing()
    for name in DrawingOptions.model_fields:
        values: list[int | None] = [getattr(each, name) for each in trained]
        chosen = used.setdefault(name, values[0] if len({*values}) == 1 else None)
        if not any((chosen, *values)):
            continue
        usual = family.prompt_length if name == "max_sequence_length" else family.image_size(family.empty_denoiser())[0]
        here = chosen or usual
        if others := sorted({value or usual for value in values} - {here}):
            listed = " and ".join(map(str, others))
            notes.append(
                f"It was erased with {flag(name)} {listed}; these images, with {here}, may show more or less of it."
            )
        elif getattr(config, name) is None and here != usual:
            notes.append(
                f"It was erased with {flag(name)} {here}, and so these images are drawn; others may show more of it."
            )
    return DrawingOptions(**used), notes


def _drawn(config: EvaluateConfig, group: dict[str, Any]) -> DrawingOptions:
    try:
        return DrawingOptions(**{name: group.get(name) for name in DrawingOptions.model_fields})
    except UserError as error:
        raise UserError(f"--erased {config.erased} says what no erasure is made with ({error}); restore its files") from None


def _check_alike(before: ModelFamily, after: ModelFamily) -> None:
    sizes = [family.image_size(family.empty_denoiser()) for family in (before, after)]
    if before.pipeline_class is not after.pipeline_class or sizes[0] != sizes[1]:
        raise UserError(f"--base {before.path} and --erased {after.path} draw images of other kinds; name the same model")


@contextlib.contextmanager
def _named_erased() -> Iterator[None]:
    """Report errors of the adapter under `--erased`, the option that names it here."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("--adapter", "--erased", 1)) from None


def _notes(family: ModelFamily, adapter: Adapter) -> list[str]:
    trained, notes = adapter.base.get("denoiser_sha256"), adapter.notes(family.empty_denoiser())
    if trained is None or trained == family.denoiser_hashes():
        return notes
    return ["The adapter was trained on other weights than these.", *notes]


class _RecordFile(TypedDict, total=False):
    """The fields read from `erased.json`; it may have more."""

    concept: list[str]
    configs: list[dict[str, Any]]


def _read_record(path: Path) -> dict[str, Any]:
    if not lexists(path):
        return {}
    try:
        record: dict[str, Any] = read_json(path)
        TypeAdapter(_RecordFile).validate_python(record, strict=True)
    except UnreadableError as error:
        raise UserError(f"--erased: {path} is damaged ({error}); restore it, or remove it and name --base") from None
    except ValidationError:
        raise UserError(f"--erased: {path} is damaged; restore it, or remove it and name --base and --concept") from None
    return record


def _preserved(configs: list[dict[str, Any]]) -> list[str]:
    groups = [group for config in configs if isinstance(group := config.get("prompts"), dict)]
    listed = [prompts for group in groups if isinstance(prompts := group.get("preserve"), list)]
    return [prompt for prompts in listed for prompt in prompts if isinstance(prompt, str)]


def _trained_on(configs: list[dict[str, Any]]) -> str | None:
    pretrained = configs[0].get("pretrained") if configs else None
    model = pretrained.get("model") if isinstance(pretrained, dict) else None
    return model if isinstance(model, str) else None
