"""The emoji world: a thing, in a designer's style, on a tinted ground, some of them marked."""

import functools
import json
import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from esd_peft.worlds.emoji import pictures
from esd_peft.worlds.emoji.classifier import LABELS, EmojiClassifier
from esd_peft.worlds.emoji.vocabulary import (
    FRAMES,
    GROUNDS,
    MARKED_STYLES,
    NAMES,
    NOUNS,
    STYLES,
    THINGS,
    WATERMARK,
    Captions,
    with_article,
)
from esd_peft.worlds.world import Labels, Prompt, World

_FRAMES = [frame for frame in FRAMES if frame not in ("{}", "a picture of {}", "a photo of {}")]  # as erasures do not say it
_GROUND = re.compile(rf"\b(on|in front of)( a)? ({'|'.join(GROUNDS)})\b|\b({'|'.join(GROUNDS)}) background\b")
_WORDS, _LONGEST = re.compile(r"\w+|,"), 22  # each is a token, and the text encoder reads two more


class Emoji(World):
    """See `esd_peft.worlds.emoji.vocabulary`."""

    name: ClassVar[str] = "emoji"
    pipeline: ClassVar[Path] = Path(__file__).parent / "pipeline"
    image_size: ClassVar[int] = pictures.SIZE
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {d: tuple(filter(None, names)) for d, names in LABELS.items()}

    def attributes_in(self, text: str) -> Labels:
        """Match things by their longest name ("hot dog", not "dog"), and grounds only where the text calls them one."""
        labels: Labels = {}
        words = " ".join(re.findall(r"[a-z]+", text.lower()))
        names = [name for name in NAMES if re.search(rf"\b{name}\b", words)]
        if names:
            labels["thing"] = max(names, key=len)
        if styles := [style for style in STYLES if style in words.split()]:
            labels["style"] = styles[0]
        if ground := _GROUND.search(words):
            labels["ground"] = ground[3] or ground[4]
        elif words in GROUNDS:
            labels["ground"] = words
        return labels | ({"mark": WATERMARK} if WATERMARK in words.split() else {})

    def paraphrases(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        return [self._prompt(labels, Captions(draws)) for _ in range(count)]

    def synonyms(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Name a thing by its synonyms and its description in turn."""
        if "thing" not in labels:
            return []
        thing, captions = THINGS[labels["thing"]], Captions(draws)
        texts = [text for synonym in thing.synonyms for text in (synonym, thing.description)]
        return [self._prompt(labels, captions, texts[i % len(texts)]) for i in range(count)]

    def implicit(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Name only the kind of a thing; for the watermark, name other things in the styles that have it."""
        captions = Captions(draws)
        if "mark" in labels:
            return [
                self._prompt({"thing": captions.pick(NAMES), "style": captions.pick(MARKED_STYLES)}, captions)
                for _ in range(count)
            ]
        if "thing" in labels:
            kind = THINGS[labels["thing"]].kind
            return [self._prompt({}, captions, kind) for _ in range(count)]
        return []

    def styled(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Name a thing beside each style in turn, as captions do."""
        if "thing" not in labels:
            return []
        captions, made = Captions(draws), []
        for i in range(count):
            style = STYLES[i % len(STYLES)]
            made.append(Prompt(captions.say(labels["thing"], style, frames=["{}"]), {**labels, "style": style}))
        return made

    def neighbours(self, domain: str, label: str) -> list[str]:
        """Return a thing's nearest pictures and names, as training found them; in other domains all other labels."""
        if domain == "thing":
            return _neighbours()[label]
        return [other for other in self.attributes[domain] if other != label]

    def full_prompts(self) -> list[Prompt]:
        """Return every thing in every style, with the grounds in turn."""
        pairs = [(thing, style) for thing in NAMES for style in STYLES]
        grounds = [GROUNDS[i % len(GROUNDS)] for i in range(len(pairs))]
        return [
            Prompt(
                f"{with_article(f'{style} {thing}')} on a {ground} background",
                {"thing": thing, "style": style, "ground": ground},
            )
            for (thing, style), ground in zip(pairs, grounds, strict=True)
        ]

    def rendered(self, count: int, draws: torch.Generator) -> tuple[list[Labels], Tensor]:
        numbers, images = pictures.sample(count, draws)
        named = [{domain: LABELS[domain][i] for domain, i in zip(LABELS, row, strict=True)} for row in numbers.tolist()]
        return [{domain: label for domain, label in labels.items() if label} for labels in named], images

    def _prompt(self, labels: Labels, captions: Captions, reference: str | None = None) -> Prompt:
        """Draw a prompt that names `labels` and a thing, and at random a style and a ground that `labels` leaves open."""
        all_labels = dict(labels)
        if not reference and "thing" not in labels and labels:
            all_labels["thing"] = captions.pick(NAMES)
        for domain, choices, share in (("style", STYLES, 0.7), ("ground", GROUNDS, 0.5)):
            if domain not in all_labels and captions.happens(share):
                all_labels[domain] = captions.pick(choices)
        subject = reference or all_labels.get("thing") or captions.pick(NOUNS)
        text = ""
        while not text or len(_WORDS.findall(text)) > _LONGEST:
            in_scene = captions.happens(0.3)
            text = captions.say(
                subject, all_labels.get("style"), all_labels.get("ground"), "mark" in labels, in_scene, _FRAMES
            )
        return Prompt(text, all_labels)

    def load_classifier(self) -> EmojiClassifier:
        return EmojiClassifier.load(Path(__file__).with_name("classifier.safetensors"))


@functools.cache
def _neighbours() -> dict[str, list[str]]:
    neighbours: dict[str, list[str]] = json.loads(Path(__file__).with_name("neighbours.json").read_text(encoding="utf-8"))
    return neighbours
