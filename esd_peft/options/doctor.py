"""The options of `python -m esd_peft.doctor`."""

from typing import Annotated

import tyro

from esd_peft.options.model import DrawingOptions, ModelOptions


class DoctorConfig(ModelOptions, DrawingOptions):
    """Say what a model is, how it would be erased from, what fits which card, and what this machine has."""

    model: Annotated[str, tyro.conf.Positional] = "shapes"
    """The model, named as in erase's --model."""
