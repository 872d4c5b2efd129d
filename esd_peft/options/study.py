"""The options of `python -m esd_peft.study`."""

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field, field_validator

from esd_peft.io.text import shown
from esd_peft.options.base import Options


def condition_name(folder: Path) -> str:
    """A condition is named like its folder."""
    return shown(folder.resolve().name)


class MakeStudyConfig(Options):
    """Write a blinded rating page: one HTML file to send to raters, and its key, which stays with you."""

    condition: Annotated[list[Path], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A folder of images made under one condition, named like it (real, base, erased); repeat the option."""
    question: str
    """What raters answer for each image, for example "How much does this look like the work of Van Gogh?"."""
    low: str = "not at all"
    """What 1 means."""
    high: str = "very much"
    """What 5 means."""
    reference: Path | None = None
    """A folder of images that raters see beside every question, for example the artist's own works."""
    per_condition: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Images of each condition, drawn at random; left out: all."""
    max_size: Annotated[int, Field(ge=16, le=4096)] = 768
    """Longer side of the images in the page, in pixels; larger ones are scaled down."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same images, options and seed give the same study."""
    output: Path = Path("study")
    """Where study.html and key.json go."""
    overwrite: bool = False
    """Replace the study in the output directory, if nothing else lies there (docs/formats.md)."""

    @field_validator("condition")
    @classmethod
    def _distinct(cls, value: list[Path]) -> list[Path]:
        names = [*map(condition_name, value)]
        if not value:
            raise ValueError("name a folder of images for each condition")
        if doubled := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"two folders are named {doubled[0]}; a condition is named like its folder, so rename one")
        return value

    @field_validator("question", "low", "high")
    @classmethod
    def _some_text(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("raters need to read something here")
        return value.strip()


class AnalyseStudyConfig(Options):
    """Means of each condition with bootstrap intervals, and how well the raters agree."""

    answers: Annotated[list[Path], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A CSV file that the page saved; repeat the option for each rater."""
    key: Path = Path("study/key.json")
    """The key that was written with the page."""
    output: Path | None = None
    """A JSON file for the figures; left out: they are only printed. An earlier analysis of the same study is replaced,
    unless somebody has changed it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the bootstrap."""

    @field_validator("answers")
    @classmethod
    def _some(cls, value: list[Path]) -> list[Path]:
        if not value:
            raise ValueError("name the CSV files that raters saved")
        return value
