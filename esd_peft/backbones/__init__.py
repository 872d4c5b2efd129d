"""What differs between pipeline families, one file each. The rest of the package knows `Backbone` only."""

import json
from importlib.resources import files
from pathlib import Path

from esd_peft.backbones.backbone import Backbone, PromptEmbeds
from esd_peft.backbones.flux import Flux
from esd_peft.backbones.pixart import PixArtSigma
from esd_peft.backbones.sana import Sana
from esd_peft.backbones.stable_diffusion import StableDiffusion
from esd_peft.backbones.stable_diffusion_3 import StableDiffusion3
from esd_peft.backbones.stable_diffusion_xl import StableDiffusionXL
from esd_peft.errors import UserError

__all__ = ["EMBEDDED", "Backbone", "PromptEmbeds", "open_backbone"]

EMBEDDED = Path(str(files("esd_peft.shapes") / "pipeline"))
FAMILIES: tuple[type[Backbone], ...] = (
    StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArtSigma, Sana,
)  # fmt: skip


def open_backbone(model: str | None, option: str = "--model") -> Backbone:
    """The backbone for a pipeline directory (none: the embedded one), by the class its `model_index.json` names.

    Loads no weights. Raises `UserError` if the directory is missing, lacks a part, or is of a family not known here.
    """
    path = EMBEDDED if model is None else Path(model)
    index_file = path / "model_index.json"
    if not index_file.is_file():
        raise UserError(f"{option} {path} is not a diffusers pipeline directory: it has no model_index.json")
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (ValueError, KeyError, TypeError, OSError):
        raise UserError(f"{option} {path}: model_index.json is damaged; restore it") from None
    for family in FAMILIES:
        if name == family.pipeline_class.__name__:
            return family(path, index, option)
    known = ", ".join(family.pipeline_class.__name__ for family in FAMILIES)
    raise UserError(f"{option} {path} is a {name}; the families known here are {known}")
