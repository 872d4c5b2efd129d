"""Folders of images, which anybody may have filled."""

import io
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from esd_peft.errors import UserError
from esd_peft.io.text import UnreadableError, read_bytes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow has fifty more decoders, none of which is needed here
LARGEST = 256 * 2**20  # bytes of a file
MOST_PIXELS = 2**26  # 192 MiB in RGB


def image_files(folder: Path, option: str) -> list[Path]:
    """The images in `folder`, by name. Raises `UserError` naming `option` if there are none."""
    try:
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    except (OSError, ValueError):
        paths = []
    if not paths:
        raise UserError(f"{option} {folder} is no folder with images; name one with {', '.join(SUFFIXES)} files")
    return paths


def decode_image(path: Path) -> Image.Image:
    """The image in RGB. Raises `UnreadableError` for whatever is wrong with it, and before much memory is taken."""
    content = read_bytes(path, LARGEST)
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise UnreadableError(f"it has {image.width} × {image.height} pixels; at most {MOST_PIXELS:,} are read")
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableError(f"it is no {', '.join(FORMATS)}") from None
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        raise UnreadableError(str(error) or type(error).__name__) from None


def image_bytes(path: Path, option: str) -> bytes:
    """The file as it is. Raises `UserError` naming `option` if it cannot be read."""
    try:
        return read_bytes(path, LARGEST)
    except UnreadableError as error:
        raise UserError(f"{option} {path} cannot be read as an image ({error}); remove it") from None


def open_image(path: Path, option: str) -> Image.Image:
    """The image in RGB. Raises `UserError` naming `option` if it cannot be read."""
    try:
        return decode_image(path)
    except UnreadableError as error:
        raise UserError(f"{option} {path} cannot be read as an image ({error}); remove it") from None


def checked_images(folder: Path, option: str) -> list[Path]:
    """`image_files` that can all be read, said before the work that needs them. Raises `UserError`."""
    paths = image_files(folder, option)
    for path in paths:
        open_image(path, option)
    return paths
