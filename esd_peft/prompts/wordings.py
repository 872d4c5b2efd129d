"""Prompts by which cross-attention learns: a concept in many contexts, what may be other names for it, and all else.

What the words of a concept do to a prompt is learned from prompts with them and without, in contexts made of random words of
the tokenizer's vocabulary. Of the words and phrases that are nearest to the concept as the text encoder reads them, the
teacher says later which are other names for it (`esd_peft.training.names`): so each comes in contexts of its own.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esd_peft.models.family import TOKENS, ModelFamily, PromptEmbeds
from esd_peft.prompts.plan import Pair, PromptPlan, names
from esd_peft.runtime.devices import release
from esd_peft.runtime.seeds import seed_for

WORDS = 2000  # of the vocabulary, at most: the first ones, which are the most frequent
CONTEXTS = 256  # of each concept
CONTEXTS_OF_A_NAME = 6  # of each candidate
HELD = 768  # prompts of random words
USES = 6  # of a word in the phrases that are candidates: most would hold the nearest word otherwise
NEAR_WORDS, PHRASES = 24, 64  # candidates of a concept; of several, fewer phrases of each
POOL = 64  # words nearest to the concept, of which phrases are made
BEFORE, AFTER = ("", "", "{u}", "{u},", "{u} {v}"), ("", "", "{x}", ", {x}", "{x} {y}", "{x} a {y}")  # what stands around it


@dataclass(frozen=True)
class Candidate:
    """What may be another name for a concept, or a neighbour of it."""

    text: str
    pairs: list[Pair]  # in random contexts, were it another name
    is_word: bool  # or a phrase


@dataclass(frozen=True)
class Wordings:
    """All of it, encoded, in host memory."""

    embeds: PromptEmbeds  # [texts, ...] each
    rows: dict[str, int]  # of each text
    words: list[str]  # of the vocabulary, none of which names a concept
    plain: list[list[Pair]]  # of each concept: its pairs of the plan,
    contexts: list[list[Pair]]  # and in random contexts
    candidates: list[list[Candidate]]
    held: list[str]  # what is to stay: every word, and random words together
    listed: list[str]  # the retain set, and what is asked to be kept

    def index(self, texts: Iterable[str]) -> Tensor:
        """Their rows, int64."""
        return torch.tensor([self.rows[text] for text in texts], dtype=torch.int64)


def encode_wordings(family: ModelFamily, plan: PromptPlan, seed: int, device: torch.device, dtype: torch.dtype) -> Wordings:
    """The wordings of `plan`'s concepts; text encoders are on the device meanwhile. All depends on the seed alone."""
    draws = random.Random(seed_for(seed, "wordings"))
    others = plan.other_names or [[] for _ in plan.concepts]
    said = [
        *plan.concepts,
        *(name for given in others for name in given),
        *(pair.goal for pair in plan.all_concept_pairs if pair.anchor),
    ]

    def clean(text: str) -> bool:
        return not any(names(name, text) for name in said)

    words = [word for word in family.whole_words()[:WORDS] if clean(word)]
    encoder = _Encoder(family, device, dtype)
    encoder.add([f"a {word}" for word in words] + plan.texts)
    contexts: list[list[Pair]] = []
    candidates: list[list[Candidate]] = []
    for concept, pairs, given in zip(plan.concepts, plan.concept_pairs, others, strict=True):

        def among_words(named: str, plain: Pair = pairs[0]) -> Pair:
            before, after = _context(words, draws)
            anchor = None if plain.anchor is None else _fill(before, plain.anchor, after)
            return replace(
                plain, prompt=_fill(before, named, after), neutral=_fill(before, plain.neutral, after), anchor=anchor
            )

        contexts.append([among_words(f"a {concept}" if i % 3 else concept) for i in range(CONTEXTS)])
        contexts[-1] += [among_words(f"a {name}") for name in given for _ in range(CONTEXTS // 8)]
        several = len(plan.concepts)
        found = [] if _is_sourced(pairs[0], concept) else _candidates(encoder, concept, words, clean, several, draws)
        found = [text for text in found if not any(names(kept, text) for kept in plan.given)]  # the user knows better
        named = [(text, [among_words(text) for _ in range(CONTEXTS_OF_A_NAME)]) for text in found]
        candidates.append([Candidate(text, made, is_word=text.count(" ") == 1) for text, made in named])
    held = [*(f"a {word}" for word in words), *words]
    held += [" ".join(draws.sample(words, min(len(words), draws.randint(2, 5)))) for _ in range(HELD)]
    held += [pair.goal for pairs in contexts for pair in pairs]
    held = [text for text in dict.fromkeys(held) if clean(text)]
    listed = list(dict.fromkeys([*plan.retain, *(pair.prompt for pair in plan.preserve)]))
    pairs = [p for group in contexts for p in group] + [p for group in candidates for c in group for p in c.pairs]
    encoder.add([t for p in pairs for t in (p.prompt, p.neutral, p.goal)] + held + listed)
    encoder.free()
    return Wordings(encoder.embeds, encoder.rows, words, plan.concept_pairs, contexts, candidates, held, listed)


def phrases(concepts: int) -> int:
    """Candidates of each of so many concepts that are phrases."""
    return max(16, PHRASES // concepts)


class _Encoder:
    """Texts, each encoded once, by text encoders that are loaded once."""

    def __init__(self, family: ModelFamily, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.device, self.pipe = family, device, family.load_encoders(device, dtype)
        self.rows: dict[str, int] = {}
        self.embeds: PromptEmbeds = {}

    @torch.no_grad()
    def add(self, texts: list[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if not new:
            return
        made = self.family.encode_many(self.pipe, new, self.device, torch.device("cpu"))
        self.embeds = {key: torch.cat([self.embeds[key], value]) if self.embeds else value for key, value in made.items()}
        self.rows |= {text: len(self.rows) + i for i, text in enumerate(new)}

    def free(self) -> None:
        """The text encoders go."""
        del self.pipe
        release(self.device)

    def nearest(self, concept: str, texts: list[str]) -> list[str]:
        """Those most like the concept first: by the cosine of their mean token, from which the mean of all is taken."""
        means = self.embeds[TOKENS].float().mean(dim=1)
        means = means - means.mean(dim=0)
        likeness = torch.cosine_similarity(means[[self.rows[text] for text in texts]], means[self.rows[concept]], dim=-1)
        return [texts[i] for i in likeness.argsort(descending=True).tolist()]


def _candidates(
    encoder: _Encoder, concept: str, words: list[str], clean: Callable[[str], bool], concepts: int, draws: random.Random
) -> list[str]:
    """The words that are nearest to the concept, and the nearest phrases of such words."""
    plain = f"a {concept}"
    encoder.add([plain])
    near = encoder.nearest(plain, [f"a {word}" for word in words])[:POOL]
    pool = [text.removeprefix("a ") for text in near]
    combined = [f"a {u} {v}" for u in pool[:16] for v in pool[:16] if u != v]
    combined += [f"a {' '.join(draws.sample(pool, min(len(pool), 2 + i % 3)))}" for i in range(900 // concepts)]
    combined = [text for text in dict.fromkeys(combined) if clean(text)]
    encoder.add(combined)
    chosen: list[str] = []
    uses: Counter[str] = Counter()
    for text in encoder.nearest(plain, combined):
        if len(chosen) < phrases(concepts) and max(uses[word] for word in text.split()[1:]) < USES:
            chosen.append(text)
            uses.update(text.split()[1:])
    return near[:NEAR_WORDS] + chosen


def _is_sourced(plain: Pair, concept: str) -> bool:
    """Whether the concept is erased from something only: another name for "striped circle" would be one for a circle."""
    return bool(plain.neutral) and names(plain.neutral, concept)


def _context(words: list[str], draws: random.Random) -> tuple[str, str]:
    """What stands before something and after it: random words, or nothing."""
    beside = {place: draws.choice(words) for place in "uvxy"}
    return draws.choice(BEFORE).format(**beside), draws.choice(AFTER).format(**beside)


def _fill(before: str, text: str, after: str) -> str:
    return " ".join(part for part in (before, text, after) if part).replace(" ,", ",").strip(", ")
