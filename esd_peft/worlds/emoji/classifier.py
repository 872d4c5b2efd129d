"""The classifier of the emoji world: a residual network that names the thing, style, ground and watermark of an image."""

import itertools

from torch import Tensor, nn
from torch.nn import functional

from esd_peft.worlds.classifier import WorldClassifier
from esd_peft.worlds.emoji.vocabulary import GROUNDS, NAMES, STYLES, WATERMARK

MARKS = ("", WATERMARK)  # an image without one has no label of that domain
LABELS: dict[str, tuple[str, ...]] = {"thing": NAMES, "style": STYLES, "ground": GROUNDS, "mark": MARKS}


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, H, W]` to `[B, out, H / stride, W / stride]`."""
        inner = self.second(functional.relu(self.norms[0](self.first(x))))
        return functional.relu(self.norms[1](inner) + self.skip(x))


class EmojiClassifier(WorldClassifier):
    """Pixels `[B, 3, 32, 32]` in [0, 1] to one row of logits per domain."""

    labels = LABELS

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = (width, width, 2 * width, 4 * width, 6 * width)
        blocks = [Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *blocks)
        # the watermark is in a corner: its head gets positions
        self.heads = nn.ModuleDict(
            {domain: nn.Linear(sizes[-1] * (16 if domain == "mark" else 1), len(names)) for domain, names in LABELS.items()}
        )

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The logits of each domain, `[B, labels]`."""
        features = self.trunk(pixels)
        pooled, flat = features.mean((2, 3)), features.flatten(1)
        return {domain: head(flat if domain == "mark" else pooled) for domain, head in self.heads.items()}
