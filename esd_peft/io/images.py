"""Folders of pictures, which anybody may have filled."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.text import UnreadableError, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow knows fifty more, whose decoders nobody needs here
LARGEST = 256 * 2**20  # bytes of a file
MOST_PIXELS = 2**26  # 192 MiB in RGB


def picture_files(folder: Path, option: str) -> list[Path]:
    """The pictures in `folder`, by name. Raises `UserError` naming `option` if there are none."""
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    except (OSError, ValueError):
        paths = []
    if not paths:
        raise UserError(f"{option} {folder} is no folder with pictures; name one with {', '.join(SUFFIXES)} files")
    return paths


def decode_picture(path: Path) -> Image.Image:
    """The picture in RGB. Raises `UnreadableError` for whatever is wrong with it, and before much memory is taken."""
    content = read_bytes(path, LARGEST)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise UnreadableError(f"it has {picture.width} × {picture.height} pixels; at most {MOST_PIXELS:,} are read")
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableError(f"it is no {', '.join(FORMATS)}") from None
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise UnreadableError(str(error) or type(error).__name__) from None


def picture_bytes(path: Path, option: str) -> bytes:
    """The file as it is. Raises `UserError` naming `option` if it cannot be read."""
    try:
        return read_bytes(path, LARGEST)
    except UnreadableError as error:
        raise UserError(f"{option} {path} cannot be read as a picture ({error}); remove it") from None


def open_picture(path: Path, option: str) -> Image.Image:
    """The picture in RGB. Raises `UserError` naming `option` if it cannot be read."""
    try:
        return decode_picture(path)
    except UnreadableError as error:
        raise UserError(f"{option} {path} cannot be read as a picture ({error}); remove it") from None


def checked_pictures(folder: Path, option: str) -> list[Path]:
    """`picture_files` that can all be read, said before the work that needs them. Raises `UserError`."""
    paths = picture_files(folder, option)
    for path in paths:
        open_picture(path, option)
    return paths


def read_pictures(folder: Path, size: tuple[int, int], option: str) -> Tensor:
    """The pictures in `folder`, resized to `size` (height, width): `[N, 3, H, W]` in [0, 1]. Raises `UserError`."""
    return torch.stack([to_pixels(open_picture(path, option).resize(size[::-1])) for path in picture_files(folder, option)])


def to_pixels(picture: Image.Image) -> Tensor:
    """`[3, H, W]` in [0, 1] of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
