"""Storage for the images of an evaluation: on disk, so that a later run can continue, or in memory."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.images import decode_image
from esd_peft.io.marks import MARK
from esd_peft.io.outputs import empty_folder, new_file, take_folder
from esd_peft.io.paths import is_dir, is_file
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.sampling import SampleIndex, to_image

_IMAGES = "images of an evaluation"  # kind of the folder


class ImageStore(ABC):
    """Images by the numbers of their prompt and seed."""

    @abstractmethod
    def missing(self, places: Sequence[SampleIndex]) -> list[SampleIndex]:
        """Return the places without an image."""

    @abstractmethod
    def add(self, place: SampleIndex, pixels: Tensor) -> None:
        """Keep one image `[3, H, W]` in [0, 1]."""

    @abstractmethod
    def read(self, place: SampleIndex) -> Image.Image:
        """One image in RGB, of 8 bits a channel."""


@dataclass
class ImageMemory(ImageStore):
    """Images of a few small prompts, in memory."""

    images: dict[SampleIndex, Image.Image] = field(default_factory=dict)

    def missing(self, places: Sequence[SampleIndex]) -> list[SampleIndex]:
        return [place for place in places if place not in self.images]

    def add(self, place: SampleIndex, pixels: Tensor) -> None:
        self.images[place] = to_image(pixels)

    def read(self, place: SampleIndex) -> Image.Image:
        return self.images[place]


@dataclass
class ImageCache(ImageStore):
    """A folder of one model's images, `PROMPT_SEED.png`.

    `made_with` holds everything that the images depend on, and is stored with them: other images are not reused.
    """

    folder: Path
    made_with: dict[str, Any]
    part_of: Path | None = None  # the folder of the evaluation

    def open(self, overwrite: bool) -> None:
        """Start, or go on. Raises `UserError` if the folder holds other images and `overwrite` is not given."""
        record = self.folder / "made_with.json"
        try:
            same = read_json(record) == json.loads(json.dumps(self.made_with))
        except UnreadableError:
            same = False
        if not same and is_dir(self.folder) and {*os.listdir(self.folder)} - {MARK}:
            if not overwrite:
                raise UserError(
                    f"--output holds {self.folder}, made by another model or with other options or versions; "
                    "name another directory or add --overwrite"
                )
            empty_folder(self.folder, _IMAGES)
        take_folder(self.folder, _IMAGES, self.part_of)
        with new_file(record) as draft:
            draft.write_text(json.dumps(self.made_with, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def path(self, place: SampleIndex) -> Path:
        return self.folder / f"{place[0]:05d}_{place[1]:03d}.png"

    def missing(self, places: Sequence[SampleIndex]) -> list[SampleIndex]:
        return [place for place in places if not is_file(self.path(place))]

    def add(self, place: SampleIndex, pixels: Tensor) -> None:
        with new_file(self.path(place)) as draft:
            to_image(pixels).save(draft)

    def read(self, place: SampleIndex) -> Image.Image:
        """Raises `UserError` if it is damaged."""
        try:
            return decode_image(self.path(place))
        except UnreadableError as error:
            raise UserError(f"--output holds {self.path(place)}, which cannot be read ({error}); remove it") from None
