"""From options to prompts: concepts, their contexts and anchors, and prompts to preserve."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TypeVar

from esd_peft.errors import UserError
from esd_peft.io.text import read_lines
from esd_peft.options.base import is_blank
from esd_peft.options.prompts import Concept, PromptOptions
from esd_peft.worlds import World

TEMPLATES = {  # template: its neutral prompt
    "{}": "", "a {}": "", "a picture of {}": "a picture", "a photo of {}": "a photo", "{} style": "style",
    "a picture in the style of {}": "a picture",
}  # fmt: skip
ATTRIBUTES = ("plain", "red", "blue", "black", "white", "small", "large", "old", "wooden", "colourful")
Item = TypeVar("Item")
MOST_PRESERVED = 10_000  # prompts: 2 GB of CLIP's embeddings, 40 of T5's; no more than so many directions are protected
SCENES = ("a city street at night", "a person by a window", "a mountain lake", "a table with flowers", "a dog on a beach")


@dataclass(frozen=True)
class Pair:
    """A guided pair of prompts, with its strength and weight.

    The target for `prompt` is `e_anchor − eta · (e_prompt − e_neutral)`, the anchor being `e_neutral` where none is named.
    """

    prompt: str  # names the concept
    neutral: str  # the same without it
    anchor: str | None = None  # for mapped concepts
    eta: float = 1.0
    weight: float = 1.0

    @property
    def anchor_prompt(self) -> str:
        """The prompt that the target aims at, at η 0: the anchor, or the neutral prompt."""
        return self.neutral if self.anchor is None else self.anchor


@dataclass(frozen=True)
class PromptPlan:
    """All prompts of a run."""

    concepts: list[str]  # their names in prompts
    concept_pairs: list[list[Pair]]  # for each concept its pairs, the plain prompt first
    preserve: list[Pair]
    retain: list[str]  # the retain set, on whose embeddings the adapter must not act
    user_preserved: list[str] = field(default_factory=list)  # preservation prompts of the options
    synonyms: list[list[str]] = field(default_factory=list)  # of each concept, from the options
    sources: list[str] = field(default_factory=list)  # what concepts are erased from, where something is named

    @property
    def all_concept_pairs(self) -> list[Pair]:
        """The pairs of all concepts, in order."""
        return [pair for pairs in self.concept_pairs for pair in pairs]

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of the concepts, then those to preserve."""
        return self.all_concept_pairs + self.preserve

    @property
    def predictions(self) -> int:
        """The number of teacher predictions at each step: e_null, e_concept and, if a pair has an anchor, e_anchor."""
        return 3 if any(pair.anchor is not None for pair in self.pairs) else 2

    @property
    def preserved_texts(self) -> list[str]:
        """The anchor prompts of the concepts, and all prompts to preserve."""
        goals = [pair.anchor_prompt for pair in self.all_concept_pairs]
        return list(dict.fromkeys([*goals, *(pair.prompt for pair in self.preserve), *self.retain]))

    @property
    def paired_texts(self) -> list[str]:
        """Every prompt of the denoiser, once."""
        texts = (t for p in self.pairs for t in (p.neutral, p.prompt, p.anchor) if t is not None)
        return list(dict.fromkeys(texts))

    @property
    def texts(self) -> list[str]:
        """Every prompt once, those of the pairs first."""
        return list(dict.fromkeys(self.paired_texts + self.retain))

    def untruncated(self, read_whole: Callable[[Iterable[str]], list[str]]) -> "PromptPlan":
        """Drop prompts that the text encoder would truncate (`read_whole`), since the cut part may be the concept.

        The plain pair of each concept stays (`esd_peft.erasure.checks` refuses one that is too long).
        """
        whole = {*read_whole(self.texts)}

        def is_whole(pair: Pair) -> bool:
            return {pair.prompt, pair.neutral, *([pair.anchor] if pair.anchor else [])} <= whole

        pairs = [[pair for i, pair in enumerate(own) if i == 0 or is_whole(pair)] for own in self.concept_pairs]
        return dataclasses.replace(self, concept_pairs=pairs, retain=[text for text in self.retain if text in whole])


def plan_prompts(options: PromptOptions, world: World | None) -> PromptPlan:
    """Make the prompts that the options describe; `world` is the embedded pipeline, if it is one.

    A prompt of the concept in a context is paired with the context alone ("a red circle" with "a red shape"), so that their
    difference is the concept and nothing else. The paper's pair is the first one.
    Raises `UserError` for words that contradict each other.
    """
    user_preserved = preserved_prompts(options)
    for prompt in user_preserved:
        if _mentions_any(options.erased_names, prompt):
            raise UserError(f"--preserve {prompt!r} names what is to be erased; leave it out or reword it")
    goals = [goal for goal in map(options.goal_of, options.concept) if goal]
    if clash := [goal for goal in goals if _mentions_any(options.erased_names, goal)]:
        raise UserError(f"--map-to {clash[0]!r} names what is to be erased; map it to something that stays")
    erasing = [_pairs_of(concept, options, world) for concept in options.concept]
    retain = _retain_set(options, user_preserved, world)
    preserved = dict.fromkeys([*user_preserved, *_sources_otherwise(options)])
    synonyms = [options.names_of(concept)[1:] for concept in options.concept]
    preserve = [Pair(prompt, "") for prompt in preserved]
    return PromptPlan(options.concept_names, erasing, preserve, retain, user_preserved, synonyms, options.sources)


def _pairs_of(concept: Concept, options: PromptOptions, world: World | None) -> list[Pair]:
    source, towards = options.source_of(concept), options.goal_of(concept)
    pairs: list[Pair] = []
    for named in options.names_of(concept):
        if not content_words(named.removesuffix(source)):
            option = "--concept" if named == options.names_of(concept)[0] else "--also-erase"
            raise UserError(f"{option} {named!r} names nothing; say what to erase, for example --concept circle")
        pairs += [
            Pair(say(named), say(source) if source else say(""), say(f"{towards} {source}".strip()) if towards else None)
            for say in _templates([named, towards or ""], options.prompt_templates == "bare", world)
        ]
    # a neutral prompt with another concept must not be preserved
    clean = [p for p in dict.fromkeys(pairs) if not _mentions_any(options.erased_names, p.neutral)]
    if not clean or any(p.prompt in (p.neutral, p.anchor) for p in clean):
        named = options.names_of(concept)[0]
        raise UserError(f"--concept {named!r} is the same as what it is erased from or mapped to; name something else")
    return [Pair(p.prompt, p.neutral, p.anchor, options.eta_of(concept), concept.weight) for p in clean]


def mentions(concept: str, prompt: str) -> bool:
    """Return whether all content words of `concept` occur in `prompt`."""
    return content_words(concept) <= content_words(prompt)


def _mentions_any(concepts: list[str], prompt: str) -> bool:
    return any(mentions(concept, prompt) for concept in concepts)


def content_words(text: str) -> set[str]:
    """The words of `text` in lower case, without punctuation, articles and the commonest prepositions."""
    words = {word.strip(".,;:!?\"'()").lower() for word in text.split() if not is_blank(word)}
    return words - {"a", "an", "the", "of", "in", "on", ""}


def shares_word(text: str, concept: str) -> bool:
    """Return whether `text` has one word of a `concept` of several words: alone it names something else or more."""
    own, said = content_words(concept), content_words(text)
    return len(own) > 1 and len(own & said) == 1


def prompts_naming(concept: str, world: World | None) -> list[str]:
    """Return the default prompts of a concept, the plain one first."""
    return [say(concept) for say in _templates([concept], False, world)]


def _templates(texts: list[str], bare: bool, world: World | None) -> list[Callable[[str], str]]:
    if bare:
        return [lambda text: text]
    own = world.prompt_templates(texts) if world is not None else None
    if own is not None:
        return own
    # the scene first: text encoders read from left to right, so its words are the same with and without the concept
    templates = TEMPLATES | {f"{scene}, {{}}": scene for scene in SCENES}
    return [functools.partial(_fill_in, template, nothing) for template, nothing in templates.items()]


def _fill_in(template: str, nothing: str, text: str) -> str:
    return template.format(text) if text else nothing


def _retain_set(options: PromptOptions, user_preserved: list[str], world: World | None) -> list[str]:
    """The null prompt, the `--preserve` prompts, and a built-in list without the prompts that name a concept.

    An attribute that is erased from something is protected beside everything else. That something is not: the words of
    "striped circle" are those of "striped" and "circle", and with both protected nothing could be learned.
    """
    sourced = [c for c in options.concept if options.source_of(c)]
    apart = [say(c.name) for c in sourced for say in _templates([c.name], options.prompt_templates == "bare", world)]
    named = options.erased_names + options.sources
    return list(
        dict.fromkeys(
            ["", *(prompt for prompt in [*user_preserved, *retain_prompts(), *apart] if not _mentions_any(named, prompt))]
        )
    )


def spread(items: list[Item], count: int | None) -> list[Item]:
    """Return `count` of the items, evenly spaced; all if there are fewer."""
    if count is None or count >= len(items):
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def retain_prompts() -> list[str]:
    """Read the built-in retain set: common subjects, styles and words of prompts."""
    return read_lines(files("esd_peft.prompts") / "retain_prompts.txt")


def _sources_otherwise(options: PromptOptions) -> list[str]:
    """Return the contexts of `--erase-from` with other attributes. The loss preserves these; the null space cannot protect
    them.
    """
    prompts: list[str] = []
    for source in options.sources:
        others = [f"{word} {source}" for word in ATTRIBUTES]
        prompts += [prompt for prompt in others if not _mentions_any(options.erased_names, prompt)]
    return prompts


def preserved_prompts(options: PromptOptions) -> list[str]:
    """The prompts of --preserve, once. Raises `UserError` if there are too many."""
    prompts = list(dict.fromkeys(options.preserve))
    if len(prompts) > MOST_PRESERVED:
        raise UserError(
            f"--preserve names {len(prompts):,} prompts, each with embeddings in memory and a trajectory "
            f"of its own; {MOST_PRESERVED:,} at most, so keep those that differ most"
        )
    return prompts
