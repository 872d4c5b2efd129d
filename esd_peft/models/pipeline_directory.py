"""A pipeline directory in diffusers' layout, of which the parts that are asked for are loaded, one at a time."""

import inspect
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin

from esd_peft.errors import UserError
from esd_peft.io.paths import is_dir, why_closed
from esd_peft.io.tensors import sha256
from esd_peft.models.hub_cache import hub_id
from esd_peft.models.parts import Part


class PipelineDirectory:
    """A pipeline directory, its parts loaded one at a time.

    Args:
        path: the directory.
        index: its parsed `model_index.json`.
        option: the option that named it, for messages.
        variant: of the weight files ("fp16"), where a part has it.

    Raises:
        UserError: a part that the family needs is missing.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    text_parts: ClassVar[tuple[str, ...]]
    optional_parts: ClassVar[tuple[str, ...]] = ()
    denoiser_part: ClassVar[str]

    def __init__(self, path: Path, index: dict[str, Any], option: str = "--model", variant: str | None = None) -> None:
        self.path, self.index, self.option, self.variant = path, index, option, variant
        self.name = hub_id(path) or path.resolve().name  # to be published: without a path of this machine
        for part in self.used:
            if not self.has(part) and part not in self.optional_parts:
                raise UserError(f"{option} {path} lacks its {part}; restore that folder")
            if reason := why_closed(path / part):  # transformers would take the folder for an empty one
                raise UserError(f"{option} {path}: its {part} cannot be read ({reason}); restore your right to read it")

    @classmethod
    def check_index(cls, index: dict[str, Any], place: str) -> None:
        """Raise `UserError`, which names the `place`, for a pipeline of this class that is none of the family, before any
        weights are downloaded."""

    @property
    def used(self) -> tuple[str, ...]:
        """The parts that are read here; a pipeline may come with others, a safety checker for example."""
        return (*self.text_parts, self.denoiser_part, "vae", "scheduler")

    def has(self, part: str) -> bool:
        """Return whether the pipeline has that component."""
        return self.index.get(part) not in (None, [None, None]) and is_dir(self.path / part)

    def part(self, name: str) -> Part:
        """Return the reader of that component."""
        return Part(self.path, name, self.index.get(name), self.option, self.variant)

    def load_part(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """One component, on the CPU. Reads safetensors only. Raises `UserError` if it cannot be loaded."""
        return self.part(part).load(dtype)

    def denoiser_files(self) -> list[Path]:
        """The files that hold the denoiser's weights."""
        return self.part(self.denoiser_part).weights.files

    def denoiser_hashes(self) -> dict[str, str]:
        """SHA-256 of these files, by name."""
        return {file.name: sha256(file) for file in self.denoiser_files()}

    def load_denoiser(self, dtype: torch.dtype) -> ModelMixin:
        """The network that is trained and merged, frozen, in eval mode."""
        denoiser: ModelMixin = self.load_part(self.denoiser_part, dtype)
        return denoiser.requires_grad_(False).eval()

    def load_config(self, part: str) -> dict[str, Any]:
        """A component's config, as stored."""
        return self.part(part).config()

    def empty_denoiser(self) -> ModelMixin:
        """The denoiser's structure on the meta device, without weights."""
        return self.empty_part(self.denoiser_part)

    def empty_part(self, part: str, dtype: torch.dtype = torch.float32, buffers: bool = False) -> Any:
        """A component's structure on the meta device, without weights; buffers may be real, as no file has all of them."""
        return self.part(part).empty(dtype, buffers)

    def assemble(self, parts: tuple[str, ...], dtype: torch.dtype, empty: bool = False, **given: Any) -> DiffusionPipeline:
        """The family's diffusers pipeline with some of its parts only; `empty` ones have no weights."""

        def load(part: str, dtype: torch.dtype) -> Any:
            return self.empty_part(part, dtype) if empty and "tokenizer" not in part else self.load_part(part, dtype)

        takes = inspect.signature(self.pipeline_class.__init__).parameters
        settings = {name: value for name, value in self.index.items() if name in takes and not isinstance(value, list)}
        if "requires_safety_checker" in takes:
            settings["requires_safety_checker"] = False
        absent = {name: None for name in takes if isinstance(self.index.get(name), list)}
        absent |= {name: None for name in ("safety_checker", "feature_extractor") if name in takes}
        loaded = {part: load(part, dtype) for part in parts if self.has(part)}
        for part in parts:
            self._fit_length(loaded.get(part), part)
        pipe = self.pipeline_class(**settings | absent | loaded | given)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _fit_length(self, tokenizer: Any, part: str) -> None:
        """Limit the tokenizer to its text encoder's positions; some are stored without a length."""
        encoder = part.replace("tokenizer", "text_encoder")
        if encoder != part and tokenizer is not None and self.has(encoder):
            positions = self.load_config(encoder).get("max_position_embeddings")
            if isinstance(positions, int):
                tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
