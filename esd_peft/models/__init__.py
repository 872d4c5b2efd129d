"""Pipeline families, one file each. The rest of the package uses `ModelFamily` only, except `adapters/export.py`, which
handles files of other tools.
"""

from esd_peft.errors import UserError
from esd_peft.io.text import shown
from esd_peft.models.chroma import Chroma
from esd_peft.models.dry_run import check_model
from esd_peft.models.family import ModelFamily, PromptEmbeds
from esd_peft.models.flux import Flux
from esd_peft.models.flux_2 import Flux2, Flux2Klein
from esd_peft.models.pixart import PixArtSigma
from esd_peft.models.qwen_image import QwenImage
from esd_peft.models.sana import Sana
from esd_peft.models.sources import local_pipeline
from esd_peft.models.stable_diffusion import StableDiffusion
from esd_peft.models.stable_diffusion_3 import StableDiffusion3
from esd_peft.models.stable_diffusion_xl import StableDiffusionXL
from esd_peft.models.wan import Wan
from esd_peft.models.z_image import ZImage
from esd_peft.options.base import check_text
from esd_peft.options.model import DrawingOptions, ModelOptions
from esd_peft.worlds import find_world

__all__ = ["ModelFamily", "PromptEmbeds", "open_family"]

FAMILIES: tuple[type[ModelFamily], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArtSigma, Sana,
    ZImage, Flux2, Flux2Klein, QwenImage, Chroma, Wan,
)  # fmt: skip


def open_family(
    model: str, option: str = "--model", options: ModelOptions | None = None, weights: bool = True
) -> ModelFamily:
    """The family for a pipeline, by the class its `model_index.json` names.

    `model` is the name of an embedded pipeline (`esd_peft.worlds`), or what `esd_peft.models.sources` takes: a directory, a
    hub id, a single-file checkpoint. Loads no weights, and without `weights` does not download them either. Raises
    `UserError` if it is not there, lacks a part, is of a family not known here, or if its parts are not whole or do not work
    together.
    """
    try:
        check_text(model, is_name=True)  # a file may have named it, and not an option
    except ValueError as error:
        raise UserError(f"{option} {shown(model)[:200]}: {error}") from None
    options = options or ModelOptions()
    families = {kind.pipeline_class.__name__: kind for kind in FAMILIES}
    world = find_world(model)
    path, index = local_pipeline(str(world.pipeline) if world else model, options, option, families, weights)
    family = families[index["_class_name"]](path, index, option, options.variant)
    if world:
        family.world, family.name = world, world.about
    if isinstance(options, DrawingOptions):
        family.draw_at(options)
    if not world:
        check_model(family, weights)
    return family
