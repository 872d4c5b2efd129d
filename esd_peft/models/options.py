"""Options that say which model it is and how to read it."""

from typing import Literal, get_args

from esd_peft.options import Options

Scope = Literal[
    "esd-x", "esd-x-strict", "esd-x-ff", "esd-u", "selfattn", "full"
]  # which layers learn (`esd_peft.models.scopes`)
SCOPES: tuple[str, ...] = get_args(Scope)


class ModelOptions(Options):
    """How to read a model that is not simply a directory."""

    revision: str | None = None
    """The branch, tag or commit of a hub repository; left out: main."""
    variant: str | None = None
    """The variant of the weight files, "fp16" for example; left out: the plain ones."""
    checkpoint_config: str | None = None
    """For a single-file checkpoint: a diffusers directory or hub id with the configs and tokenizers that fit it; left
    out: the original model's, from the hub or its cache."""
    allow_pickle: bool = False
    """Read .ckpt and .bin files too. A pickle can run code: only from someone you trust."""


class PretrainedOptions(ModelOptions):
    """Which model is changed, and how to read it."""

    model: str = "shapes"
    """A pipeline directory in diffusers' layout (Stable Diffusion 1 to 3.5, SDXL, FLUX.1, FLUX.2, Z-Image, Qwen-Image,
    Chroma, PixArt-Σ, Sana, Wan), the hub id of one, a single-file checkpoint, or an embedded pipeline: shapes, emoji."""
