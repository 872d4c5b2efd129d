"""The shapes world: one shape, in one colour, with one texture, on a grey ground."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import ShapesClassifier
from esd_peft.worlds.world import Labels, Prompt, World


class Shapes(World):
    """See `esd_peft.worlds.shapes.world`."""

    name: ClassVar[str] = "shapes"
    pipeline: ClassVar[Path] = Path(__file__).parent / "pipeline"
    image_size: ClassVar[int] = world.SIZE
    attributes: ClassVar[dict[str, tuple[str, ...]]] = world.ATTRIBUTES

    def attributes_in(self, text: str) -> Labels:
        return world.attributes_in(text)

    def paraphrases(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Draw full prompts, in turn in templates that no erasure trains on."""
        fitting = [full for full in map(world.attributes_in, world.full_prompts()) if labels.items() <= full.items()]
        chosen = torch.randint(len(fitting), (count,), generator=draws).tolist()
        texts = [world.prompt(fitting[k], world.WORDINGS[i % len(world.WORDINGS)]) for i, k in enumerate(chosen)]
        return [Prompt(text, world.attributes_in(text)) for text in texts]

    def neighbours(self, domain: str, label: str) -> list[str]:
        return [other for other in self.attributes[domain] if other != label]

    def full_prompts(self) -> list[Prompt]:
        return [Prompt(text, world.attributes_in(text)) for text in world.full_prompts()]

    def rendered(self, count: int, draws: torch.Generator) -> tuple[list[Labels], Tensor]:
        numbers, pixels = world.sample(count, draws)
        named = [dict(zip(self.attributes, row, strict=True)) for row in numbers.tolist()]
        return [{kind: self.attributes[kind][i] for kind, i in row.items()} for row in named], pixels

    def prompt_templates(self, texts: list[str]) -> list[Callable[[str], str]]:
        return world.prompt_templates(texts)

    def load_classifier(self) -> ShapesClassifier:
        return ShapesClassifier.load(Path(__file__).with_name("classifier.safetensors"))
