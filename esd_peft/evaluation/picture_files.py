"""Folders of pictures."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from esd_peft.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def picture_files(folder: Path, option: str) -> list[Path]:
    """The pictures in `folder`, by name. Raises `UserError` naming `option` if there are none."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{option} {folder} is no folder with pictures; name one with {', '.join(SUFFIXES)} files")
    return paths


def open_picture(path: Path, option: str) -> Image.Image:
    """The picture in RGB. Raises `UserError` naming `option` if it cannot be read."""
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"{option} {path} cannot be read as a picture ({error}); remove it") from None


def read_pictures(folder: Path, size: tuple[int, int], option: str) -> Tensor:
    """The pictures in `folder`, resized to `size` (height, width): `[N, 3, H, W]` in [0, 1]. Raises `UserError`."""
    return torch.stack([to_pixels(open_picture(path, option).resize(size[::-1])) for path in picture_files(folder, option)])


def to_pixels(picture: Image.Image) -> Tensor:
    """`[3, H, W]` in [0, 1] of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
