"""Pictures on disk, which a later run goes on with."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.images import decode_picture
from esd_peft.io.outputs import MARK, empty_folder, new_file, take_folder
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.sampling import Place, to_image


@dataclass
class Album:
    """A folder of one model's pictures, `PROMPT_SEED.png`.

    `made_with` is all that the pictures depend on; it stands beside them, so that others are not taken for them.
    """

    folder: Path
    made_with: dict[str, Any]

    def open(self, overwrite: bool) -> None:
        """Start, or go on. Raises `UserError` if the folder holds other pictures and `overwrite` is not given."""
        record = self.folder / "made_with.json"
        try:
            same = read_json(record) == json.loads(json.dumps(self.made_with))
        except UnreadableError:
            same = False
        if not same and self.folder.is_dir() and {*os.listdir(self.folder)} - {MARK}:
            if not overwrite:
                raise UserError(
                    f"--output holds {self.folder}, made by another model or with other options or versions; "
                    "name another directory or add --overwrite"
                )
            empty_folder(self.folder)
        take_folder(self.folder)
        with new_file(record) as draft:
            draft.write_text(json.dumps(self.made_with, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def path(self, place: Place) -> Path:
        return self.folder / f"{place[0]:05d}_{place[1]:03d}.png"

    def missing(self, places: Sequence[Place]) -> list[Place]:
        """Those whose pictures are still to be made."""
        return [place for place in places if not self.path(place).is_file()]

    def add(self, place: Place, pixels: Tensor) -> None:
        """Write one picture `[3, H, W]` in [0, 1]."""
        with new_file(self.path(place)) as draft:
            to_image(pixels).save(draft)

    def read(self, place: Place) -> Image.Image:
        """One picture. Raises `UserError` if it is damaged."""
        try:
            return decode_picture(self.path(place))
        except UnreadableError as error:
            raise UserError(f"--output holds {self.path(place)}, which cannot be read ({error}); remove it") from None

    def batches(self, places: Sequence[Place], batch_size: int) -> Iterator[list[Image.Image]]:
        """The pictures in order, so many at a time."""
        for start in range(0, len(places), batch_size):
            yield [self.read(place) for place in places[start : start + batch_size]]
