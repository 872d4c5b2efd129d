"""What differs between pipeline families, one file each. The rest of the package knows `Backbone` only."""

from importlib.resources import files
from pathlib import Path

from esd_peft.config import ModelOptions
from esd_peft.models.family import Backbone, PromptEmbeds
from esd_peft.models.flux import Flux
from esd_peft.models.pixart import PixArtSigma
from esd_peft.models.sana import Sana
from esd_peft.models.sources import local_pipeline
from esd_peft.models.stable_diffusion import StableDiffusion
from esd_peft.models.stable_diffusion_3 import StableDiffusion3
from esd_peft.models.stable_diffusion_xl import StableDiffusionXL

__all__ = ["EMBEDDED", "Backbone", "PromptEmbeds", "open_backbone"]

EMBEDDED = Path(str(files("esd_peft.worlds.shapes") / "pipeline"))
FAMILIES: tuple[type[Backbone], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArtSigma, Sana,
)  # fmt: skip


def open_backbone(
    model: str | None, option: str = "--model", options: ModelOptions | None = None, weights: bool = True
) -> Backbone:
    """The backbone for a pipeline (none: the embedded one), by the class its `model_index.json` names.

    `model` is what `esd_peft.models.sources` takes: a directory, a hub id, a single-file checkpoint. Loads no weights, and
    without `weights` does not download them either. Raises `UserError` if it is not there, lacks a part, or is of a family
    not known here,
    or if its parts are not whole or do not work together.
    """
    options = options or ModelOptions()
    families = {family.pipeline_class.__name__: family for family in FAMILIES}
    path, index = local_pipeline(str(EMBEDDED) if model is None else model, options, option, families, weights)
    backbone = families[index["_class_name"]](path, index, option, options.variant)
    if model is None:
        backbone.name = "the embedded shapes pipeline"
    else:
        backbone.check(weights)
    return backbone
