"""Common parts of the classifiers: a head for each domain, names of labels, a file of weights."""

from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esd_peft.worlds.world import SURE, Labels

CONFIDENCE = 0.9  # probability of the first domain's label from which on the classifier is sure


class WorldClassifier(nn.Module):
    """Pixels `[B, 3, H, W]` in [0, 1] to one row of logits `[B, labels]` for each domain."""

    labels: ClassVar[dict[str, tuple[str, ...]]]  # by domain; "" where an image has none of them

    @torch.no_grad()
    def classify(self, images: Tensor) -> list[Labels]:
        """Return the labels of each image, by domain, and `SURE` if the first domain's has a probability of 0.9."""
        logits = self(images.float())
        best = {domain: values.argmax(1).tolist() for domain, values in logits.items()}
        sure = (next(iter(logits.values())).softmax(1).amax(1) >= CONFIDENCE).tolist()
        named = [{domain: self.labels[domain][best[domain][i]] for domain in best} for i in range(len(images))]
        return [
            {domain: label for domain, label in labels.items() if label} | (SURE if clear else {})
            for labels, clear in zip(named, sure, strict=True)
        ]

    def save(self, path: Path) -> None:
        """Write the weights in fp16."""
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the weights that `save` wrote, in fp32 on the CPU."""
        model = cls()
        model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        return model.eval()
