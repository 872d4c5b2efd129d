"""The options of the merge command, and those of an upload, which the erase command has too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro
from pydantic import Field, field_validator, model_validator

from esd_peft.options.base import Options
from esd_peft.options.model import ModelOptions
from esd_peft.options.renamed import OLD, renamed


class HubOptions(Options):
    """Upload of the result to the Hugging Face hub, with its model card."""

    push_to_hub: str | None = None
    """Upload the result at the end, with its card, to this repository of the hub: OWNER/NAME, or a NAME under your own. One
    that is not there yet is made, and is private until you make it public there. The token is that of hf auth login, or
    HF_TOKEN; whether it may write there is looked at before any work. Left out: nothing is uploaded."""


class MergeConfig(ModelOptions, HubOptions):
    """Merge an adapter into its base: a plain pipeline that needs neither peft nor this package."""

    gone: ClassVar[Mapping[str, str]] = OLD
    adapter: Annotated[list[Path], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """The directory that `python -m esd_peft.erase` wrote; repeat the option for several, which add up."""
    output: Path
    """Where the merged pipeline goes: a diffusers directory, or with a name that ends in .safetensors one file: a checkpoint
    (Stable Diffusion 1.x, 2.x, XL), or the transformer for ComfyUI (FLUX.1, Stable Diffusion 3, PixArt-Σ, Z-Image,
    Qwen-Image)."""
    base: str | None = None
    """What to merge into: a directory, a hub id, a single-file checkpoint; left out: what the adapter was trained on."""
    scale: Annotated[list[Annotated[float, Field(gt=0, le=10)]], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """How much of the adapter is merged; left out: all of it, 1. Once for all adapters, or once for each."""
    overwrite: bool = False
    """Replace the merged model that is at the output, if nothing else lies there (docs/formats.md)."""
    verify: bool = True
    """Compare each merged layer, as it is on disk, with base + adapter."""
    unmerge: Annotated[bool, tyro.conf.FlagCreatePairsOff] = Field(default=False, exclude=True)
    """Refused: it would undo an erasure."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**renamed(values))

    @field_validator("adapter", "scale", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path | float | int) else value

    @field_validator("adapter")
    @classmethod
    def _some(cls, value: list[Path]) -> list[Path]:
        if not value:
            raise ValueError("name the directory that the erase command wrote")
        if len(set(value)) < len(value):
            raise ValueError("name each adapter once")
        return value

    @model_validator(mode="after")
    def _can_be_done(self) -> "MergeConfig":
        if self.unmerge:
            raise ValueError("--unmerge would bring the concept back; the base was left as it is, go on from there")
        if self.push_to_hub and self.single_file:
            raise ValueError("--push-to-hub uploads a directory with its card; give an --output without .safetensors")
        if len(self.scale) not in (0, 1, len(self.adapter)):
            raise ValueError(f"--scale: give it once, or once for each of the {len(self.adapter)} adapters")
        return self

    @property
    def scales(self) -> list[float]:
        """The strengths, one for each adapter."""
        return self.scale * len(self.adapter) if len(self.scale) == 1 else self.scale or [1.0] * len(self.adapter)

    @property
    def single_file(self) -> bool:
        """True if the output is one checkpoint file."""
        return self.output.suffix == ".safetensors"
