"""The classifier of the embedded pipeline: a small network that names the shape, colour and texture of an image."""

from torch import Tensor, nn

from esd_peft.worlds.classifier import WorldClassifier
from esd_peft.worlds.shapes.world import ATTRIBUTES


class ShapesClassifier(WorldClassifier):
    """Pixels `[B, 3, 32, 32]` in [0, 1] to one row of logits per attribute kind."""

    labels = ATTRIBUTES

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            layers += [nn.Conv2d(out, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.heads = nn.ModuleDict({kind: nn.Linear(4 * channels, len(v)) for kind, v in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The logits of each kind, `[B, labels]`."""
        features = self.trunk(pixels)
        return {kind: head(features) for kind, head in self.heads.items()}
