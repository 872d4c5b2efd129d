"""How far an erasure has moved predictions: of the concept, of what it was to keep, and of what nobody listed.

Teacher and student are asked at the same x_t, along trajectories that training has not seen. Of a prompt with the concept
the part of its direction that is left counts, ⟨s − e_neutral, d⟩ / ⟨d, d⟩ with d = e_prompt − e_neutral: 1 before training,
0 when it is gone, −η at the guided target. Of any other prompt how far it has moved, ‖s − e‖, as a share of what it says,
‖e − e_null‖, or of what the concept says where that is more: what says next to nothing may move by as much unseen. Images
show more, and cost a hundred times as much.
"""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.augmentation import MANY_WORDS
from esd_peft.prompts.plan import Pair, PromptPlan, mentions, spread
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.runtime.seeds import generator, seed_for
from esd_peft.training.buffer import Buffer
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student
from esd_peft.training.work import probe_rollout, sampled

EACH = 6  # prompts of a kind
CONCEPTS = 4  # that are looked at, where there are more
PLACES = (0.3, 0.6)  # of a trajectory, whose x_t are looked at
MUCH_LEFT, FAR = 0.3, 0.5  # from here on images show it


@dataclass
class Probes:
    """Prompts by which a student is looked at: the concepts in contexts, and what is to stay."""

    contexts: list[list[Pair]]  # of each concept that is looked at
    listed: list[str]
    unlisted: list[str]
    near: list[str] = field(default_factory=list)
    embeds: PromptEmbeds = field(default_factory=dict)  # of `texts`

    @property
    def texts(self) -> list[str]:
        """Every prompt, once."""
        pairs = [pair for group in self.contexts for pair in group]
        texts = [text for pair in pairs for text in (pair.prompt, pair.neutral)]
        return list(dict.fromkeys(["", *texts, *self.listed, *self.unlisted, *self.near]))

    def add_near(self, texts: list[str], embeds: PromptEmbeds) -> None:
        """What was found to be like the concepts, of which some are looked at; `embeds` are those of `texts`."""
        known = {*self.texts}
        rows = torch.tensor([i for i, text in enumerate(texts) if text not in known][:EACH], dtype=torch.int64)
        self.near = [texts[row] for row in rows]
        self.embeds = {name: torch.cat([value.cpu(), embeds[name][rows].cpu()]) for name, value in self.embeds.items()}


@dataclass
class Diagnosis:
    """What was found, by prompt."""

    left: dict[str, float] = field(default_factory=dict)  # of the concept's direction
    listed: dict[str, float] = field(default_factory=dict)  # how far these have moved,
    near: dict[str, float] = field(default_factory=dict)  # what is like the concept and on no list,
    unlisted: dict[str, float] = field(default_factory=dict)  # and random words together

    def to_dict(self) -> dict[str, Any]:
        """For `result.json`: the figures, and what follows from them."""
        return asdict(self) | {"advice": [*self.advice()]}

    def advice(self) -> Iterator[str]:
        """What to turn, in plain words; one sentence says so where nothing has to be."""
        fine = True
        less = "fewer --max-train-steps, a lower --learning-rate or a narrower --scope move it less"
        if self.left and mean(self.left.values()) > MUCH_LEFT:
            fine = False
            yield (
                f"{mean(self.left.values()):.0%} of the concept's direction is left: train longer (--max-train-steps), at a "
                "higher --learning-rate, or past the null prompt (--negative-guidance)"
            )
        for moved, who, remedy in (
            (self.listed, "on the list", less),
            (
                self.near,
                "like the concept",
                "name what must stay with --preserve, and what is the concept with --also-erase",
            ),
            (self.unlisted, "on no list", less),
        ):
            far = {text: share for text, share in moved.items() if share > FAR}
            if far:
                fine = False
                worst = max(far, key=far.__getitem__)
                yield f"{len(far)} of {len(moved)} prompts {who} moved far, {worst!r} by {far[worst]:.0%}: {remedy}"
        if fine and self.left:
            yield "nothing stands out: the concept's direction is gone and what was looked at beside it is in place"


def choose_probes(family: ModelFamily, plan: PromptPlan, seed: int) -> Probes:
    """Concepts beside random words of the tokenizer's vocabulary, some of what is listed, and such words alone.

    Where the tokenizer knows few words there is nothing unlisted, and the concepts come in prompts of the plan.
    """
    said = [*plan.concepts, *itertools.chain(*plan.synonyms), *plan.user_preserved]
    words = [word for word in family.whole_words() if not any(mentions(text, word) for text in said)]
    listed = spread([text for text in plan.preserved_texts if text], EACH)
    looked_at = spread(plan.concept_pairs, CONCEPTS)
    if len(words) < MANY_WORDS:
        return Probes([spread(pairs, EACH) for pairs in looked_at], listed, [])
    draws = random.Random(seed_for(seed, "diagnosis"))
    some = [" ".join(draws.sample(words, 2)) for _ in range(2 * EACH)]
    beside = [[_beside(pairs[0], text) for text in some[:EACH]] for pairs in looked_at]
    return Probes(beside, listed, some[EACH:])


def _beside(plain: Pair, text: str) -> Pair:
    anchor = None if plain.anchor is None else f"{text}, {plain.anchor}"
    return replace(plain, prompt=f"{text}, {plain.prompt}", neutral=f"{text}, {plain.neutral}".rstrip(", "), anchor=anchor)


@torch.no_grad()
def diagnose(rollout: Rollout, table: PairTable, probes: Probes, options: BufferOptions, seed: int) -> Diagnosis:
    """Look at the student as it is. What that costs is not counted."""
    device, draws = rollout.student.device, generator(seed, "diagnosis")
    # contrastive training has no trajectories, and says nothing about them
    options = probe_rollout(sampled(options, rollout.student.family))
    alone = replace(rollout, profiler=PhaseProfiler(device), shared=False)
    left: dict[str, list[float]] = defaultdict(list)
    moved: dict[str, list[float]] = defaultdict(list)
    for pairs, contexts in zip(spread(table.concepts, CONCEPTS), probes.contexts, strict=True):
        trajectory = alone.collect(table, torch.tensor(pairs[:1]), options, draws, progress=False)
        for place in PLACES:
            sample = trajectory.index(torch.tensor([int(place * len(trajectory))]), device)
            taught, made = _predictions(rollout.student, sample, probes, options.rollout_batch_size)
            null, named = sample.teacher[:2].float().flatten(1)
            for pair in contexts:
                left[pair.prompt].append(_left(pair, taught, made))
            for text in (*probes.listed, *probes.near, *probes.unlisted):
                said = max((taught[text] - taught[""]).norm(), (named - null).norm())
                moved[text].append(_share((made[text] - taught[text]).norm(), said))
    listed, near, unlisted = (
        {text: mean(moved[text]) for text in texts} for texts in (probes.listed, probes.near, probes.unlisted)
    )
    return Diagnosis({text: mean(shares) for text, shares in left.items()}, listed, near, unlisted)


Predicted = dict[str, Tensor]  # of each prompt, flat and in fp32


def _predictions(student: Student, sample: Buffer, probes: Probes, batch_size: int) -> tuple[Predicted, Predicted]:
    """What teacher and student predict at the x_t of `sample`."""
    with student.teacher():
        taught = student.predict_each(sample, probes.embeds, batch_size)
    made = student.predict_each(sample, probes.embeds, batch_size)
    return dict(zip(probes.texts, taught, strict=True)), dict(zip(probes.texts, made, strict=True))


def _left(pair: Pair, taught: Predicted, made: Predicted) -> float:
    """Of the concept's direction."""
    neutral, direction = taught[pair.neutral], taught[pair.prompt] - taught[pair.neutral]
    return _share((made[pair.prompt] - neutral) @ direction, direction.square().sum())


def _share(part: Tensor, whole: Tensor) -> float:
    """0 where there is nothing to move."""
    return (part / whole).item() if whole > 0 else 0.0
