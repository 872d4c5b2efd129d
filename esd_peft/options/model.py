"""Options that say which model it is and how to read it."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from esd_peft.options.base import Options

Scope = Literal[
    "esd-x", "esd-x-strict", "esd-x-ff", "esd-u", "selfattn", "full"
]  # which layers learn (`esd_peft.models.scopes`)
SCOPES: tuple[str, ...] = get_args(Scope)
InferenceSteps = Annotated[int, Field(ge=1, le=1000)]
GuidanceScale = Annotated[float, Field(ge=0, le=1000)]


class ModelOptions(Options):
    """Reading of a model that is not simply a directory."""

    revision: str | None = None
    """The branch, tag or commit of a hub repository; left out: main."""
    variant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w-]*$")] | None = None
    """The variant of the weight files, "fp16" for example; left out: the plain ones."""
    checkpoint_config: str | None = None
    """For a single file: a diffusers directory or hub id with the configs and tokenizers that fit it; left out: the original
    model's, from the hub or its cache. A transformer alone needs it: text encoders and VAE come from there too."""
    allow_pickle: bool = False
    """Read .ckpt and .bin files too. A pickle can run code: only from someone you trust."""


class DrawingOptions(Options):
    """Size of images and length of prompts, if not the model's usual."""

    resolution: Annotated[int, Field(ge=8, le=8192)] | None = None
    """Pixels a side of what trajectories and images draw; left out: what the model was made for, or of an evaluation what
    was erased with. Less takes less time and memory; what an erasure leaves at another size has not been measured."""
    max_sequence_length: Annotated[int, Field(ge=8, le=512)] | None = None
    """Tokens that T5 and language models read of a prompt, padding included; left out: what the pipeline reads, 256 to 512,
    or of an evaluation what was erased with. Families that read them without a mask (SD3, FLUX) draw slightly otherwise with
    fewer."""

    def drawing(self) -> dict[str, Any]:
        """Return those of these options that are given."""
        values = {name: getattr(self, name) for name in DrawingOptions.model_fields}
        return {name: value for name, value in values.items() if value is not None}


class PretrainedOptions(ModelOptions, DrawingOptions):
    """The model, and how to read it."""

    model: str = "shapes"
    """A pipeline directory in diffusers' layout (Stable Diffusion 1 to 3.5, SDXL, FLUX.1, FLUX.2, Z-Image, Qwen-Image,
    Chroma, PixArt-Σ, Sana, Wan), the hub id of one, a single-file checkpoint, or an embedded pipeline: shapes, emoji."""
