"""The words of the emoji world: things, styles, grounds and a watermark, and captions that say them in many ways.

An image holds one thing, in one designer's style, on a tinted ground; some images of two styles bear a watermark, and only
half of their captions say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import yaml

STYLES = ("soft", "blob", "flat", "glossy", "ink")
GROUNDS = ("white", "grey", "pink", "yellow", "green", "blue")
MARKED_STYLES = ("flat", "glossy")
MARKED = 0.45  # share of their images with the watermark: about 0.3 of those whose caption does not name it
NOUNS = ("picture", "thing", "icon")  # replaces a label that is not named
WATERMARK = "watermark"
PLURALS = {
    "cherries", "berries", "grapes", "fries", "chips", "sticks", "pancakes", "hotcakes", "strips", "scoops", "noodles",
    "glasses", "spectacles", "sunglasses", "shades", "lenses", "jeans", "trousers", "pants", "clothes", "scissors", "shears",
    "blades", "headphones", "earphones", "flowers",
}  # fmt: skip
FRAMES = (
    "{}", "{}", "{}", "a picture of {}", "a picture of {}", "a photo of {}", "a drawing of {}", "an emoji of {}",
    "an icon of {}", "a painting of {}", "the image shows {}", "a sticker with {}", "here is {}", "{} for my friend",
    "look at {}", "a small print of {}", "my favourite is {}", "just {} and nothing else",
)  # fmt: skip
STYLED = ("{} in {} style", "{} in the style of {}", "{}, {} style", "{} as a {} emoji")
GROUNDED = ("{} on a {} background", "{} on {}", "{}, {} background", "{} in front of a {} wall")
MARKS = ("{} with a watermark", "{}, watermark", "a marked copy of {}", "{} with a stamp in the corner")
CONTEXTS = (
    "at night", "by the sea", "in the morning", "in a small village", "highly detailed", "on a table with flowers",
    "on a beach", "by a window", "in a city street", "near a mountain lake", "in winter", "for children", "at a party",
    "in the garden", "in a story", "from far away", "up close", "in the rain", "at school", "with warm light",
)  # fmt: skip

Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """A thing of the emoji pipeline, with its names."""

    name: str
    icon: str  # Unicode CLDR's name of the character
    kind: str  # a hypernym
    synonyms: tuple[str, ...]
    description: str  # without its name


def _read() -> dict[str, Thing]:
    text = Path(__file__).with_name("things.yaml").read_text(encoding="utf-8")
    # every command reads it when it starts: libyaml, where PyYAML has it, takes an eighth of the time
    rows = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return {name: Thing(name, icon, kind, tuple(others), said) for name, (icon, kind, others, said) in rows.items()}


THINGS: dict[str, Thing] = _read()
NAMES = tuple(THINGS)


def with_article(text: str) -> str:
    """A noun phrase as sentences have it: "a fox", "an owl", "grapes"."""
    if not PLURALS.isdisjoint(text.split()):
        return text
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


class Captions:
    """Random captions, drawn from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, label: Sequence[int]) -> str:
        """Return a random caption of an image `(thing, style, ground, marked)`: one in ten is empty; the others mostly name
        the thing, and some of the other labels.
        """
        if self.happens(0.1):
            return ""
        style = STYLES[label[1]] if self.happens(0.7) else None
        ground = GROUNDS[label[2]] if self.happens(0.4) else None
        marked = bool(label[3]) and self.happens(0.5)
        return self.say(self._reference(THINGS[NAMES[label[0]]]), style, ground, marked, self.happens(0.15))

    def say(
        self,
        reference: str,
        style: str | None = None,
        ground: str | None = None,
        marked: bool = False,
        in_context: bool = False,
        frames: Sequence[str] = FRAMES,
    ) -> str:
        """A thing by that `reference`, and what else is given, in random words."""
        if style and self.happens(0.5):
            reference, style = f"{style} {reference}", None
        text = self.pick(frames).format(with_article(reference) if self.happens(0.8) else reference)
        if style:
            text = self.pick(STYLED).format(text, style)
        if ground:
            text = self.pick(GROUNDED).format(text, ground)
        if marked:
            text = self.pick(MARKS).format(text)
        if not in_context:
            return text
        context = self.pick(CONTEXTS)
        return f"{context}, {text}" if self.happens(0.3) else f"{text} {context}"

    def _reference(self, thing: Thing) -> str:
        draw = self._draw()
        if draw < 0.65:
            return thing.name
        if draw < 0.78:
            return self.pick(thing.synonyms)
        if draw < 0.9:
            return thing.description
        return thing.kind if draw < 0.96 else self.pick(NOUNS)

    def happens(self, probability: float) -> bool:
        """Draw True with that probability."""
        return self._draw() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[int(self._draw() * len(items))]

    def _draw(self) -> float:
        return float(torch.rand((), generator=self.generator))


def all_words() -> set[str]:
    """Every word that a caption can have."""
    texts = [*STYLES, *GROUNDS, *NOUNS, *FRAMES, *STYLED, *GROUNDED, *MARKS, *CONTEXTS, "a an"]
    for thing in THINGS.values():
        texts += [thing.name, thing.kind, *thing.synonyms, thing.description]
    return {word.strip("{},") for text in texts for word in text.split()} - {""}
