"""Pictures of the emoji world: what designers drew, put on tinted grounds, and some of them marked.

Everything random comes from a `torch.Generator`, so a seed gives the same images everywhere.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from esd_peft.worlds.emoji.vocabulary import GROUNDS, MARKED, MARKED_STYLES, NAMES, STYLES

SHEETS = Path(__file__).parent / "drawings"
PIXELS, COLUMNS = 64, 16  # of a picture on a sheet, and pictures a row
SIZE = 32  # pixels a side of an image
_TINTS = torch.tensor(
    [[0.97, 0.97, 0.97], [0.62, 0.62, 0.64], [0.98, 0.72, 0.82], [0.98, 0.92, 0.55], [0.62, 0.88, 0.62], [0.58, 0.76, 0.98]]
)
_MARK = torch.tensor(  # the watermark: a dark plate with light strokes
    [[1, 1, 1, 1, 1, 1, 1, 1, 1],
     [1, 0, 1, 0, 1, 0, 0, 0, 1],
     [1, 0, 1, 0, 1, 0, 1, 0, 1],
     [1, 0, 0, 0, 1, 0, 0, 0, 1],
     [1, 1, 1, 1, 1, 1, 1, 1, 1]]
)  # fmt: skip


@functools.cache
def sheets() -> Tensor:
    """The drawings `[styles, things, 4, 64, 64]` fp32 in [0, 1]: colour times opacity, and opacity."""
    parts = []
    for style in STYLES:
        sheet = torch.from_numpy(np.array(Image.open(SHEETS / f"{style}.png"))).float() / 255
        cells = sheet.unfold(0, PIXELS, PIXELS).unfold(1, PIXELS, PIXELS).flatten(0, 1)[: len(NAMES)]
        parts.append(torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], dim=1))
    return torch.stack(parts)


def sample_labels(count: int, generator: torch.Generator) -> Tensor:
    """Random labels `[count, 4]` int64: thing, style, ground, and whether a watermark is on it."""
    sizes = (len(NAMES), len(STYLES), len(GROUNDS))
    things, styles, grounds = (torch.randint(size, (count,), generator=generator) for size in sizes)
    may_be = torch.isin(styles, torch.tensor([STYLES.index(style) for style in MARKED_STYLES]))
    marked = may_be & (torch.rand(count, generator=generator) < MARKED)
    return torch.stack([things, styles, grounds, marked.long()], dim=1)


def render(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels `[B, 3, 32, 32]` fp32 in [0, 1] of labels `[B, 4]`: place, size, slant, tint and mirroring differ."""
    count = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count).uniform_(low, high, generator=generator)

    zoom, angle, shear = uniform(1.02, 1.25), uniform(-0.12, 0.12), uniform(-0.06, 0.06)
    mirror = 1 - 2 * torch.randint(2, (count,), generator=generator).float()
    rows = torch.stack([
        torch.stack([zoom * angle.cos() * mirror, zoom * (shear - angle.sin()), uniform(-0.1, 0.1)], dim=1),
        torch.stack([zoom * angle.sin() * mirror, zoom * angle.cos(), uniform(-0.1, 0.1)], dim=1),
    ], dim=1)  # fmt: skip
    grid = functional.affine_grid(rows, [count, 4, 2 * SIZE, 2 * SIZE], align_corners=False)
    drawn = functional.grid_sample(sheets()[labels[:, 1], labels[:, 0]], grid, align_corners=False)
    drawn = functional.avg_pool2d(drawn, 2)
    tint = (
        _TINTS[labels[:, 2]]
        + uniform(-0.03, 0.03)[:, None]
        + torch.empty(count, 3).uniform_(-0.02, 0.02, generator=generator)
    )
    images = drawn[:, :3] + (1 - drawn[:, 3:]) * tint[:, :, None, None]
    places = torch.randint(2, (count, 2), generator=generator)
    return _mark(images, labels[:, 3].bool(), places).clamp(0, 1)


def _mark(images: Tensor, marked: Tensor, places: Tensor) -> Tensor:
    """The watermark in the lower right corner of those that are `marked`, up to a pixel off."""
    height, width = _MARK.shape
    ink = torch.where(_MARK.bool(), 0.15, 0.95)
    for i in marked.nonzero().squeeze(1).tolist():
        down, right = (SIZE - 1 - size - int(place) for size, place in zip((height, width), places[i], strict=True))
        images[i, :, down : down + height, right : right + width] = ink * torch.tensor([1.0, 0.9, 1.0])[:, None, None]
    return images


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random labels `[count, 4]` and their images `[count, 3, 32, 32]`."""
    labels = sample_labels(count, generator)
    return labels, render(labels, generator)
