"""What to erase, from what, towards what, and what to preserve: from the config to prompts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TypeVar

from esd_peft.config import Concept, EraseConfig
from esd_peft.errors import UserError
from esd_peft.io.text import UnreadableError, read_lines
from esd_peft.worlds.shapes import world

TEMPLATES = {  # and what they say of nothing
    "{}": "", "a {}": "", "a picture of {}": "a picture", "a photo of {}": "a photo", "{} style": "style",
    "a picture in the style of {}": "a picture",
}  # fmt: skip
ATTRIBUTES = ("plain", "red", "blue", "black", "white", "small", "large", "old", "wooden", "colourful")
Item = TypeVar("Item")
HELD = 16  # protected prompts that --robust holds along trajectories of their own
SCENES = ("a city street at night", "a person by a window", "a mountain lake", "a table with flowers", "a dog on a beach")


@dataclass(frozen=True)
class Pair:
    """A guided pair of prompts, and what the student learns of it.

    The target for `prompt` is `e_anchor − eta · (e_prompt − e_neutral)`, the anchor being `e_neutral` where none is named.
    """

    prompt: str  # names the concept
    neutral: str  # the same without it
    anchor: str | None = None  # what it shall become
    eta: float = 1.0
    weight: float = 1.0
    found: str | None = None  # brings the concept back (`training.adversarial`), asked of the student instead

    @property
    def asked(self) -> str:
        """What the student is asked."""
        return self.prompt if self.found is None else self.found

    @property
    def goal(self) -> str:
        """What is to be drawn instead, were η 0."""
        return self.neutral if self.anchor is None else self.anchor


@dataclass(frozen=True)
class PromptPlan:
    """All prompts of a run."""

    erasing: list[list[Pair]]  # for each concept its pairs, the plain wording first
    preserve: list[Pair]
    protected: list[str]  # whose embeddings the adapter must not act on
    asked: list[str] = field(default_factory=list)  # to be preserved, by the config's own words

    @property
    def erasing_pairs(self) -> list[Pair]:
        """Concept by concept."""
        return [pair for pairs in self.erasing for pair in pairs]

    @property
    def pairs(self) -> list[Pair]:
        """The erasing ones, then the preserved ones."""
        return self.erasing_pairs + self.preserve

    @property
    def kept(self) -> list[str]:
        """What the concepts become, and all that stays."""
        goals = [pair.goal for pair in self.erasing_pairs]
        return list(dict.fromkeys([*goals, *(pair.prompt for pair in self.preserve), *self.protected]))

    @property
    def paired_texts(self) -> list[str]:
        """Every prompt that the denoiser is asked, once."""
        texts = (t for p in self.pairs for t in (p.neutral, p.prompt, p.anchor, p.found) if t is not None)
        return list(dict.fromkeys(texts))

    @property
    def texts(self) -> list[str]:
        """Every prompt, once, those of the pairs first."""
        return list(dict.fromkeys(self.paired_texts + self.protected))


def plan_prompts(config: EraseConfig) -> PromptPlan:
    """From what the config names to prompts. Raises `UserError` if `preserve_file` cannot be read.

    The concept beside other things is paired with the other things alone ("a red circle" with "a red shape"): what
    stands between the two is the concept, and nothing else is pushed away. The paper's pair is the first one.
    """
    asked = _asked_to_preserve(config)
    for prompt in asked:
        if _names_any(config.concept_names, prompt):
            raise UserError(f"--preserve {prompt!r} names what is to be erased; leave it out or reword it")
    if clash := [goal for goal in map(config.goal_of, config.concept) if goal and _names_any(config.concept_names, goal)]:
        raise UserError(f"--map-to {clash[0]!r} names what is to be erased; map it to something that stays")
    erasing = [_pairs_of(concept, config) for concept in config.concept]
    protected = _protected(config, asked)
    # layers that no null space protects learn with --robust: these are held to some of what is to stay
    some = spread(protected[1:], HELD) if config.robust else []
    held = dict.fromkeys([*asked, *_sources_otherwise(config), *some])
    return PromptPlan(erasing, [Pair(prompt, "") for prompt in held], protected, asked)


def _pairs_of(concept: Concept, config: EraseConfig) -> list[Pair]:
    if not _content_words(concept.name):
        raise UserError(f"--concept {concept.name!r} names nothing; say what to erase, for example --concept circle")
    source, towards = config.source_of(concept), config.goal_of(concept)
    named = f"{concept.name} {source}".strip()
    pairs = [
        Pair(say(named), say(source) if source else say(""), say(f"{towards} {source}".strip()) if towards else None)
        for say in _wordings([named, towards or ""], config)
    ]
    # what another concept stands beside must not be taught to stay
    clean = [p for p in dict.fromkeys(pairs) if not _names_any(config.concept_names, p.neutral)]
    if not clean or any(p.prompt in (p.neutral, p.anchor) for p in clean):
        raise UserError(f"--concept {named!r} is the same as what it is erased from or mapped to; name something else")
    return [Pair(p.prompt, p.neutral, p.anchor, config.eta_of(concept), concept.weight) for p in clean]


def names(concept: str, prompt: str) -> bool:
    """Whether all content words of `concept` stand in `prompt`."""
    return _content_words(concept) <= _content_words(prompt)


def _names_any(concepts: list[str], prompt: str) -> bool:
    return any(names(concept, prompt) for concept in concepts)


def _content_words(text: str) -> set[str]:
    return {word.strip(".,;:!?\"'()").lower() for word in text.split()} - {"a", "an", "the", "of", "in", "on", ""}


def _wordings(texts: list[str], config: EraseConfig) -> list[Callable[[str], str]]:
    if config.wordings == "bare":
        return [lambda text: text]
    if config.model is None:
        return world.wordings(texts)
    # the scene first: text encoders read from left to right, so its words are the same with and without the concept
    templates = TEMPLATES | {f"{scene}, {{}}": scene for scene in SCENES}
    return [functools.partial(_fill_in, template, nothing) for template, nothing in templates.items()]


def _fill_in(template: str, nothing: str, text: str) -> str:
    return template.format(text) if text else nothing


def _protected(config: EraseConfig, asked: list[str]) -> list[str]:
    """The null prompt, the `--preserve` prompts, and a built-in list without the prompts that name a concept.

    An attribute that is erased from something is protected beside everything else. That something is not: the words of
    "striped circle" are those of "striped" and "circle", and with both protected nothing could be learned.
    """
    everyday = world.everyday() if config.model is None else everyday_prompts()
    apart = [say(c.name) for c in config.concept if config.source_of(c) for say in _wordings([c.name], config)]
    named = config.concept_names + config.sources
    return list(dict.fromkeys(["", *(prompt for prompt in [*asked, *everyday, *apart] if not _names_any(named, prompt))]))


def spread(items: list[Item], count: int | None) -> list[Item]:
    """`count` of the items, evenly spread; all where there are no more."""
    if count is None or count >= len(items):
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def everyday_prompts() -> list[str]:
    """The built-in list: common subjects, styles and words of prompts."""
    return read_lines(files("esd_peft.prompts") / "retain_prompts.txt")


def _sources_otherwise(config: EraseConfig) -> list[str]:
    """What concepts are erased from, with other attributes: these the loss holds, as they cannot be protected."""
    prompts: list[str] = []
    for source in config.sources:
        others = world.attributed(source) if config.model is None else [f"{word} {source}" for word in ATTRIBUTES]
        prompts += [prompt for prompt in others if not _names_any(config.concept_names, prompt)]
    return prompts


def _asked_to_preserve(config: EraseConfig) -> list[str]:
    prompts = [*config.preserve]
    if config.preserve_file is not None:
        try:
            prompts += read_lines(config.preserve_file)
        except UnreadableError as error:
            raise UserError(f"--preserve-file {config.preserve_file} cannot be read: {error}") from None
        if not prompts:
            raise UserError(f"--preserve-file {config.preserve_file} holds no prompt; write one a line")
    return list(dict.fromkeys(prompts))
