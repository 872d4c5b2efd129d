"""The emoji world: a thing, in a designer's style, on a tinted ground, some of them marked."""

from pathlib import Path
from typing import ClassVar

from esd_peft.worlds.emoji import pictures
from esd_peft.worlds.emoji.classifier import LABELS, Classifier, load_classifier
from esd_peft.worlds.world import World


class Emoji(World):
    """See `esd_peft.worlds.emoji.vocabulary`."""

    name: ClassVar[str] = "emoji"
    pipeline: ClassVar[Path] = Path(__file__).parent / "pipeline"
    image_size: ClassVar[int] = pictures.SIZE
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {d: tuple(filter(None, names)) for d, names in LABELS.items()}

    def load_classifier(self) -> Classifier:
        return load_classifier()
