"""Many prompts to learn from: a concept in many contexts, candidates for its synonyms, and everything else.

What the words of a concept do to a prompt is learned from prompts with them and without, in contexts made of random words of
the tokenizer's vocabulary. Of the words, names and phrases that are nearest to the concept as the text encoder reads them,
the teacher says later which are other names for it (`esd_peft.training.synonyms`): so each comes in contexts of its own.

CLIP's tokenizer knows 32,230 words. The first 2,000 hold the rest in place, but tiger, violin and picasso come later: so
what is near a concept is looked for among all of them, and among names of artists, famous people, characters and places.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files

import torch
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.text import read_lines
from esd_peft.models.family import MASK, TOKENS, ModelFamily, PromptEmbeds, index_embeds
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.prompts.plan import Pair, PromptPlan, mentions, shares_word
from esd_peft.runtime.seeds import seed_for

MANY_WORDS = 500  # of a vocabulary: with fewer there is too little to hold the rest with
WORDS = 2000  # of the vocabulary, at most, that stand in contexts: the first ones, which are the most frequent
SHORT = 10  # tokens by which these are found: of prompts of one word or name, those after it say no more
CLOSE = 200  # words near to a concept, around which a half of what holds stands
# frequent words before a noun: what they make of one is often another thing
MODIFIERS = (
    "red", "blue", "green", "yellow", "black", "white", "brown", "pink", "orange", "purple", "grey", "golden", "big",
    "small", "old", "young", "wooden", "glass", "wild", "hot", "cold", "dark", "sweet", "plastic", "paper", "metal", "toy",
)  # fmt: skip
USES = 6  # of a word in the phrases that are candidates: most would hold the nearest word otherwise
NEAR_WORDS = 24  # candidates of a concept
SHARING = 48  # candidates that share a word with a concept of several words
POOL = 64  # words nearest to the concept, of which phrases are made
AROUND = (0, 0, 1, 1, 2, 3, 4, 6)  # so many words stand before it, and after it
BETWEEN = (
    "of",
    "a",
    "the",
    "in",
    "on",
    "with",
    "and",
    "by",
    "at",
    "for",
    "near",
    ",",
)  # what may stand before each of these


@dataclass(frozen=True)
class Amounts:
    """Numbers of prompts."""

    alone: int | None  # of the words that stand in contexts, so many are held by themselves, too; none: all
    near: int  # of all other words and of the names, those that are nearest to the concepts,
    looked_at: int  # among so many
    contexts: int  # random contexts of the concepts together
    fewest: int  # and of each at least
    of_a_name: int  # contexts of each candidate
    held: int  # prompts of random words, one half around a word that is near to a concept
    phrases: int  # candidates of a concept; of several, fewer of each


# Cross-attention learns from them at no cost, and CLIP, which it is with, reads them in no time. T5 and language models have
# thousands of times as much to do for a prompt, whose embeddings are megabytes; and the denoiser as a whole sees fewer
MANY_PROMPTS = Amounts(alone=None, near=256, looked_at=40000, contexts=512, fewest=128, of_a_name=6, held=2000, phrases=64)
FEW_PROMPTS = Amounts(alone=192, near=96, looked_at=10000, contexts=96, fewest=32, of_a_name=3, held=192, phrases=24)


def amounts(method: str) -> Amounts:
    """Return the numbers of prompts that a method learns from."""
    return FEW_PROMPTS if method == "denoiser" else MANY_PROMPTS


@dataclass(frozen=True)
class Candidate:
    """A possible synonym or neighbour of a concept."""

    text: str
    pairs: list[Pair]  # in random contexts, were it another name
    is_word: bool  # or a phrase
    shares_word: bool = False  # with a concept of several words, as "red apple" does with "green apple"


@dataclass(frozen=True)
class PromptTable:
    """The prompts of a run that learns from many, encoded, in host memory."""

    embeds: PromptEmbeds  # [texts, ...] each
    rows: dict[str, int]  # of each text
    words: list[str]  # of the vocabulary, as "a word"; none of them names a concept
    plain: list[list[Pair]]  # of each concept: its pairs of the plan,
    contexts: list[list[Pair]]  # and in random contexts
    candidates: list[list[Candidate]]
    unrelated: list[str]  # preservation prompts: every word, and random words together
    retained: list[str]  # the retain set
    preserved: list[str]  # what options ask to preserve, and what concepts are erased from with other attributes

    def index(self, texts: Iterable[str]) -> Tensor:
        """Their rows, int64."""
        return torch.tensor([self.rows[text] for text in texts], dtype=torch.int64)

    def encoded(self, texts: Iterable[str]) -> PromptEmbeds:
        """Their embeddings."""
        return index_embeds(self.embeds, self.index(texts))


def augment_prompts(text_encoder: TextEncoder, plan: PromptPlan, seed: int, size: Amounts) -> PromptTable:
    """The prompts for `plan`'s concepts, so many. All depends on the seed alone.

    Raises `UserError` if the tokenizer knows no words but the concepts' own.
    """
    draws, family = random.Random(seed_for(seed, "wordings")), text_encoder.family
    encoder = _Encoder(text_encoder, in_short=size.alone is not None)
    words, near = _vocabulary(encoder, plan, size)
    if not words:
        raise UserError("--concept: the tokenizer knows no other words to preserve the rest with; use --method trajectories")
    alone = list(dict.fromkeys((words if size.alone is None else draws.sample(words, min(len(words), size.alone))) + near))
    encoder.add([f"a {word}" for word in alone] + plan.texts)
    contexts = _contexts(plan, words, draws, size)
    candidates = _candidates(encoder, plan, words, alone, draws, size)
    held = [*(f"a {word}" for word in alone), *alone]
    held += [_some_words(words, draws, draws.randint(2, 10)) for _ in range(size.held // 2)]
    ranked = [encoder.nearest(f"a {concept}", held[: len(alone)]) for concept in plan.concepts]
    close = [text for near in ranked for text in near[: CLOSE // len(ranked)]]
    held += [_among_words(words, draws, Pair("", ""), draws.choice(close)).prompt for _ in range(size.held // 2)]
    held += [pair.anchor_prompt for pairs in contexts for pair in pairs]
    # of a longer prompt the encoder may not read the concept
    drawn = [p.prompt for group in contexts for p in group] + [p.prompt for g in candidates for c in g for p in c.pairs]
    whole = {*family.read_whole(dict.fromkeys(drawn + held))}
    contexts = [[pair for pair in pairs if pair.prompt in whole] for pairs in contexts]
    candidates = [[replace(c, pairs=[p for p in c.pairs if p.prompt in whole]) for c in group] for group in candidates]
    held = [text for text in _unsaid(plan, held) if text in whole]
    given = list(dict.fromkeys(pair.prompt for pair in plan.preserve))
    listed = [text for text in dict.fromkeys(plan.retain) if text not in given]
    pairs = [p for group in contexts for p in group] + [p for group in candidates for c in group for p in c.pairs]
    encoder.add([t for p in pairs for t in (p.prompt, p.neutral, p.anchor_prompt)] + held + listed + given)
    encoder.add([candidate.text for group in candidates for candidate in group])
    words = [word for word in words if f"a {word}" in encoder.rows]
    return PromptTable(encoder.embeds, encoder.rows, words, plan.concept_pairs, contexts, candidates, held, listed, given)


def _contexts(plan: PromptPlan, words: list[str], draws: random.Random, size: Amounts) -> list[list[Pair]]:
    """Return the pairs of each concept in random contexts, under all names that are given for it."""
    others = plan.synonyms or [[] for _ in plan.concepts]
    count = max(size.fewest, size.contexts // len(plan.concepts))
    made = []
    for concept, pairs, given in zip(plan.concepts, plan.concept_pairs, others, strict=True):
        named = [f"a {concept}" if i % 3 else concept for i in range(count)]
        named += [f"a {name}" for name in given for _ in range(count // 8)]
        made.append([_among_words(words, draws, pairs[0], text) for text in named])
    return made


def _candidates(
    encoder: "_Encoder", plan: PromptPlan, words: list[str], alone: list[str], draws: random.Random, size: Amounts
) -> list[list[Candidate]]:
    """Return the possible synonyms of each concept, without prompts that the user preserves."""
    made = []
    for concept, pairs in zip(plan.concepts, plan.concept_pairs, strict=True):
        found = [] if _is_sourced(pairs[0], concept) else _nearest(encoder, concept, alone, plan, draws, size)
        found = [
            text for text in found if not any(mentions(kept, text) or mentions(text, kept) for kept in plan.user_preserved)
        ]
        among = [[_among_words(words, draws, pairs[0], text) for _ in range(size.of_a_name)] for text in found]
        is_word = [text.removeprefix("a ") in alone for text in found]
        shared = [shares_word(text, concept) for text in found]
        made.append([Candidate(*one) for one in zip(found, among, is_word, shared, strict=True)])
    return made


def _vocabulary(encoder: "_Encoder", plan: PromptPlan, size: Amounts) -> tuple[list[str], list[str]]:
    """The tokenizer's first words, and of its others and the built-in names those that are near a concept; of the first
    too, unless all of them are held. None of them names one, or what one becomes."""
    known = _unsaid(plan, encoder.family.whole_words())
    rarer = known[0 if size.alone else WORDS :][: size.looked_at] + _unsaid(plan, known_names(encoder.family))
    return known[:WORDS], encoder.shortlist(plan.concepts, rarer, size.near // len(plan.concepts)) if rarer else []


def _unsaid(plan: PromptPlan, texts: Iterable[str]) -> list[str]:
    """Return the distinct texts that mention no concept and no anchor."""
    anchors = [pair.anchor for pair in plan.all_concept_pairs if pair.anchor]
    said = dict.fromkeys([*plan.concepts, *itertools.chain(*plan.synonyms), *anchors])
    return [text for text in dict.fromkeys(texts) if not any(mentions(name, text) for name in said)]


def known_names(family: ModelFamily) -> list[str]:
    """The built-in names that the tokenizer knows; it spells others, and the text encoder has learned nothing of these."""
    found = read_lines(files("esd_peft.prompts") / "names.txt")
    counts = [count for count, _ in family.token_counts([f"a {name}" for name in found])]  # with both ends of a prompt
    most = [min(SHORT, 3 + 2 * len(name.split())) + family.template_length for name in found]
    return [name for name, count, fits in zip(found, counts, most, strict=True) if count <= fits]


def phrases(size: Amounts, concepts: int) -> int:
    """Candidates of each of so many concepts that are phrases."""
    return max(16, size.phrases // concepts)


class _Encoder:
    """Texts, each encoded once."""

    def __init__(self, text_encoder: TextEncoder, in_short: bool) -> None:
        self.text_encoder, self.family = text_encoder, text_encoder.family
        self.in_short = in_short  # what is near is found by prompts that are cut to a few tokens
        self.rows: dict[str, int] = {}
        self.embeds: PromptEmbeds = {}
        self.means: dict[str, Tensor] = {}  # of texts as they are read in short

    @torch.no_grad()
    def add(self, texts: list[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if not new:
            return
        made = self.text_encoder.encode(new)
        self.embeds = {key: torch.cat([self.embeds[key], value]) if self.embeds else value for key, value in made.items()}
        self.rows |= {text: len(self.rows) + i for i, text in enumerate(new)}

    @torch.no_grad()
    def shortlist(self, concepts: list[str], words: list[str], count: int) -> list[str]:
        """The `count` words that are nearest to each concept, by the first tokens of prompts that hold nothing else."""
        texts = [f"a {text}" for text in (*concepts, *words)]
        counts = [count for count, _ in self.family.token_counts(texts[: len(concepts)])]
        longest = max(SHORT + self.family.template_length, *counts)
        means = _centred(self._read_in_short(texts, longest))
        likeness = means[: len(concepts)] @ means[len(concepts) :].T
        return [words[i] for i in dict.fromkeys(likeness.topk(min(count, len(words))).indices.flatten().tolist())]

    def _read_in_short(self, texts: list[str], length: int) -> Tensor:
        """Mean tokens `[texts, width]` of the first `length`."""
        return torch.cat([_means(part).cpu() for part in self.text_encoder.encode_short(texts, length)])

    def nearest(self, concept: str, texts: list[str]) -> list[str]:
        """Sort by similarity to the concept: the cosine of mean tokens, centred on the mean of all.

        Of T5 and language models only the beginnings are read: what follows are hundreds of tokens of padding.
        """
        if self.in_short:
            if new := [text for text in dict.fromkeys([concept, *texts]) if text not in self.means]:
                means = self._read_in_short(new, SHORT + self.family.template_length)
                self.means |= dict(zip(new, means, strict=True))
            rows, means = {text: i for i, text in enumerate(self.means)}, _centred(torch.stack([*self.means.values()]))
        else:
            self.add([concept, *texts])
            rows, means = self.rows, _centred(_means(self.embeds))
        likeness = means[[rows[text] for text in texts]] @ means[rows[concept]]
        return [texts[i] for i in likeness.argsort(descending=True).tolist()]


def _means(embeds: PromptEmbeds) -> Tensor:
    """Return the mean token of each text, `[texts, width]` fp32, without masked tokens."""
    tokens, mask = embeds[TOKENS].float(), embeds.get(MASK)
    if mask is None:
        return tokens.mean(dim=1)
    counts = mask.float()[..., None]
    return (tokens * counts).sum(dim=1) / counts.sum(dim=1)


def _centred(means: Tensor) -> Tensor:
    """Unit vectors `[texts, width]`, whose products say how alike texts are: mean tokens, less the mean of all texts."""
    return torch.nn.functional.normalize(means - means.mean(dim=0), dim=-1)


def _nearest(
    encoder: _Encoder, concept: str, words: list[str], plan: PromptPlan, draws: random.Random, size: Amounts
) -> list[str]:
    """The words that are nearest to the concept, and the nearest phrases of such words."""
    plain = f"a {concept}"
    near = encoder.nearest(plain, [f"a {word}" for word in words])[:POOL]
    pool = [text.removeprefix("a ") for text in near]
    combined = [f"a {u} {v}" for u in pool[:16] for v in pool[:16] if u != v]
    combined += [f"a {' '.join(draws.sample(pool, min(len(pool), 2 + i % 3)))}" for i in range(900 // len(plan.concepts))]
    combined = _unsaid(plan, combined)
    chosen: list[str] = []
    uses: Counter[str] = Counter()
    for text in encoder.nearest(plain, combined):
        if len(chosen) < phrases(size, len(plan.concepts)) and max(uses[word] for word in text.split()[1:]) < USES:
            chosen.append(text)
            uses.update(text.split()[1:])
    return list(dict.fromkeys(near[:NEAR_WORDS] + chosen + _sharing(encoder, concept, words, plan, draws)))


def _sharing(encoder: _Encoder, concept: str, words: list[str], plan: PromptPlan, draws: random.Random) -> list[str]:
    """For a concept of several words, names in which another word stands in the place of one of these ("a red apple" for
    "green apple"): common modifiers, the words that make the nearest names, and random words.
    """
    own = concept.split()
    if len(own) < 2:
        return []
    each, found = SHARING // (4 * len(own)), []
    for i in range(len(own)):
        common, rest = (
            _unsaid(plan, (f"a {' '.join([*own[:i], word, *own[i + 1 :]])}" for word in some if word.lower() not in own))
            for some in ((m for m in MODIFIERS if m in words), (w for w in words if w not in MODIFIERS))
        )
        found += common[: 2 * each] if i < len(own) - 1 else []
        found += encoder.nearest(f"a {concept}", rest)[:each] + draws.sample(rest, min(len(rest), each))
    return found


def _is_sourced(plain: Pair, concept: str) -> bool:
    """Return whether the concept is erased from a source only: a synonym of "striped circle" would be one of a circle."""
    return bool(plain.neutral) and mentions(plain.neutral, concept)


def _among_words(words: list[str], draws: random.Random, plain: Pair, named: str) -> Pair:
    """The pair with `named` for its concept, between random words."""
    before, after = _context(words, draws)
    anchor = None if plain.anchor is None else _fill(before, plain.anchor, after)
    return replace(plain, prompt=_fill(before, named, after), neutral=_fill(before, plain.neutral, after), anchor=anchor)


def _context(words: list[str], draws: random.Random) -> tuple[str, str]:
    """Draw the context before and after something: random words, or nothing."""
    before, after = (_some_words(words, draws, draws.choice(AROUND)) for _ in range(2))
    comma, other = (", " if draws.random() < 0.3 else " " for _ in range(2))
    return before and before + comma, after and other + after


def _some_words(words: list[str], draws: random.Random, count: int) -> str:
    """Draw random words, some of them joined as words of sentences are."""
    chosen: list[str] = []
    for _ in range(count):
        if draws.random() < 0.35:
            chosen.append(draws.choice(BETWEEN))
        chosen.append(draws.choice(words))
    return " ".join(chosen)


def _fill(before: str, text: str, after: str) -> str:
    return " ".join(f"{before}{text}{after}".split()).replace(" ,", ",").strip(", ")
