"""Images as tensors."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from esd_peft.io.images import image_files, open_image


def read_images(folder: Path, size: tuple[int, int], option: str) -> Tensor:
    """The images in `folder`, resized to `size` (height, width): `[N, 3, H, W]` in [0, 1]. Raises `UserError`."""
    return torch.stack([to_pixels(open_image(path, option).resize(size[::-1])) for path in image_files(folder, option)])


def to_pixels(image: Image.Image) -> Tensor:
    """`[3, H, W]` in [0, 1] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
