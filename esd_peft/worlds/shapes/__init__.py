"""The shapes world: one shape, in one colour, with one texture, on a grey ground."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import Classifier, load_classifier
from esd_peft.worlds.world import World


class Shapes(World):
    """See `esd_peft.worlds.shapes.world`."""

    name: ClassVar[str] = "shapes"
    pipeline: ClassVar[Path] = Path(__file__).parent / "pipeline"
    image_size: ClassVar[int] = world.SIZE
    attributes: ClassVar[dict[str, tuple[str, ...]]] = world.ATTRIBUTES
    captions: ClassVar[tuple[str, ...]] = world.TEMPLATES

    def attributes_in(self, text: str) -> dict[str, str]:
        return world.attributes_in(text)

    def prompt(self, named: dict[str, str], template: str = "a {}") -> str:
        return world.prompt(named, template)

    def full_prompts(self) -> list[str]:
        return world.full_prompts()

    def prompt_templates(self, texts: list[str]) -> list[Callable[[str], str]]:
        return world.prompt_templates(texts)

    def retain_prompts(self) -> list[str]:
        return world.retain_prompts()

    def attributed(self, thing: str) -> list[str]:
        return world.attributed(thing)

    def load_classifier(self) -> Classifier:
        return load_classifier()
