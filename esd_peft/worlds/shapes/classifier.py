"""The classifier of the embedded pipeline: a small network that names the shape, colour and texture of an image."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esd_peft.worlds.shapes.world import ATTRIBUTES

WEIGHTS = Path(__file__).parent / "classifier.safetensors"


class Classifier(nn.Module):
    """Pixels `[B, 3, 32, 32]` in [0, 1] to one row of logits per attribute kind."""

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
        features = self.trunk(pixels)
        return {kind: head(features) for kind, head in self.heads.items()}

    @torch.no_grad()
    def name(self, pixels: Tensor) -> list[dict[str, str]]:
        """What each image shows: `{"shape": "circle", "colour": "red", "texture": "striped"}`."""
        best = {kind: logits.argmax(1).tolist() for kind, logits in self(pixels.float()).items()}
        return [{kind: ATTRIBUTES[kind][best[kind][i]] for kind in best} for i in range(len(pixels))]

    def save(self, path: Path) -> None:
        """Write the weights in fp16."""
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, path)


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The shipped classifier, in fp32 on the CPU."""
    model = Classifier()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()
