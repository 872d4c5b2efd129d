"""The teacher probe: which words are the concept under another name, as the teacher itself sees it.

The teacher denoises a few trajectories. For a synonym the direction e_word − e_null is the concept's, e_concept − e_null, at
the same x_t; for a word that merely resembles the concept, or stands beside it in the text encoder, it is another one. Of a
fox on the embedded emoji pipeline vixen and sly are found so, and dog and heart told apart.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esd_peft.options.training import BufferOptions
from esd_peft.prompts.augmentation import Candidate, PromptTable
from esd_peft.prompts.plan import Pair, PromptPlan
from esd_peft.prompts.table import make_table
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import send
from esd_peft.training.buffer import Buffer, concatenate
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student
from esd_peft.training.work import LOOKED_AT, other_trajectories, own_trajectories, probe_rollout

SAME, OTHER = 0.7, 0.5  # from this mean cosine on it is a synonym; below that one it is something else
OPEN = 0.4  # below this one along the first trajectory, a candidate is not probed again
Watch = Callable[[torch.Generator], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class SynonymMatch:
    """One concept's candidates, sorted."""

    synonyms: list[Candidate]  # erased with the concept
    others: list[Candidate]  # preserved
    undecided: list[Candidate] = field(default_factory=list)  # neither: between the two, or a word of the concept's own name
    nfe: int = 0  # what that took


@dataclass
class TeacherProbe:
    """Samples of the probe. A pair is a trajectory here: those of the first concept, ..., then those of others."""

    samples: Buffer  # of all trajectories; `teacher` has e_null and e_concept
    matches: list[SynonymMatch]  # of each concept's candidates
    each: int  # trajectories of a concept

    @property
    def own(self) -> int:
        """The number of the concepts' trajectories."""
        return self.each * len(self.matches)

    def concept_of(self, pairs: Tensor) -> Tensor:
        """The concept along whose trajectory each of the `pairs` lies, int64; −1: none."""
        return torch.where(pairs < self.own, pairs // self.each, -1)


def probe_teacher(
    rollout: Rollout,
    prompts: PromptTable,
    options: BufferOptions,
    draws: torch.Generator,
    watch: Watch = lambda draws: contextlib.nullcontext(),
    known: Sequence[SynonymMatch] = (),
) -> TeacherProbe:
    """Denoise the trajectories, within `watch` each time, and sort the candidates along the concepts' own.

    With `known` matches nothing is sorted again. Each process denoises all trajectories, as there are few.
    """
    options, concepts = probe_rollout(options), [pairs[0] for pairs in prompts.plain]
    rollout = dataclasses.replace(rollout, shared=False)
    each, cpu = own_trajectories(len(concepts)), torch.device("cpu")

    def drive(plan: PromptPlan) -> Buffer:
        rows, device = prompts.index(plan.texts), rollout.student.device
        table = make_table(plan, {name: send(value[rows], device) for name, value in prompts.embeds.items()})
        with watch(draws):
            return rollout.collect(table, torch.arange(len(table)), options, draws, progress=False)

    own = drive(PromptPlan([p.prompt for p in concepts], [[p] * each for p in concepts], [], []))
    matches = [*known]
    for number in range(len(matches), len(concepts)):
        mine = range(number * each, (number + 1) * each)
        along = [own.index((own.pairs == pair).nonzero().squeeze(1), cpu) for pair in mine]
        matches.append(match_synonyms(rollout.student, prompts, number, along, 2 * options.rollout_batch_size))
        rollout.profiler.nfe += matches[-1].nfe
        rollout.profiler.count("trajectories", {"evaluation": matches[-1].nfe})
    if distributed.world_size() > 1:  # one cosine on the other side of a bound would lead to other draws ever after
        matches = to_matches(prompts, distributed.broadcast(to_texts(matches)))
    chosen = _others(prompts, matches, other_trajectories(len(concepts)), draws)
    others = drive(PromptPlan([], [], [Pair(text, "") for text in chosen], []))
    own = dataclasses.replace(own, teacher=own.teacher[:2])
    others = dataclasses.replace(others, pairs=others.pairs + each * len(concepts))
    return TeacherProbe(concatenate([own, others]), matches, each)


def _others(prompts: PromptTable, matches: list[SynonymMatch], count: int, draws: torch.Generator) -> list[str]:
    """`count` prompts: a half neighbours of the concepts, the nearest of each first, as far as there are any; the rest
    random words, none of which may be a concept under another name."""
    ranked = neighbours(matches)
    chosen = ranked[: count // 2]
    near = {*ranked, *(c.text for match in matches for c in (*match.synonyms, *match.undecided))}
    far = [text for word in prompts.words if (text := f"a {word}") not in near]
    return chosen + [far[i] for i in torch.randperm(len(far), generator=draws)[: count - len(chosen)].tolist()]


@torch.no_grad()
def match_synonyms(
    student: Student, prompts: PromptTable, concept: int, trajectories: list[Buffer], batch_size: int
) -> SynonymMatch:
    """Sort the candidates of the `concept`-th concept, along `trajectories` of it that the teacher has denoised.

    At one x_t or another a neighbour may look like a synonym (a tulip like a rose, with a cosine of 0.8), along several
    trajectories it does not. What is nothing like it along the first is not probed again.
    """
    candidates = prompts.candidates[concept]
    likeness, nfe, open_ = torch.zeros(len(candidates)), 0, torch.arange(len(candidates))
    for number, trajectory in enumerate(trajectories if candidates else []):
        distributed.stop_together()  # in every process, whatever it has left to ask
        if not len(open_):
            continue
        found = _likeness(student, prompts, [candidates[i].text for i in open_], trajectory, batch_size)
        likeness[open_] += (found - likeness[open_]) / (number + 1)
        nfe += len(LOOKED_AT) * len(open_)
        if number == 0:
            open_ = (likeness >= OPEN).nonzero().squeeze(1)
    synonyms: list[Candidate] = []
    others: list[Candidate] = []
    undecided: list[Candidate] = []
    for candidate, like in zip(candidates, likeness.tolist(), strict=True):
        kind = others if like < OTHER else synonyms if like >= SAME and not candidate.shares_word else undecided
        kind.append(candidate)
    return SynonymMatch(synonyms, others, undecided, nfe)


def _likeness(student: Student, prompts: PromptTable, texts: list[str], trajectory: Buffer, batch_size: int) -> Tensor:
    """The mean cosine of each text's direction and the concept's, `[texts]`."""
    embeds, likeness = prompts.encoded(texts), torch.zeros(len(texts))
    for place in LOOKED_AT:
        sample = trajectory.index(torch.tensor([int(place * len(trajectory))]), student.device)
        null, named = sample.teacher[:2].float().flatten(1)
        with student.teacher():
            predicted = student.predict_each(sample, embeds, batch_size)
        cosines = torch.cosine_similarity(predicted - null, (named - null).expand(len(texts), -1))
        likeness += cosines.cpu() / len(LOOKED_AT)
    return likeness


def neighbours(matches: Sequence[SynonymMatch]) -> list[str]:
    """Prompts that are like a concept and preserved, once: those that share a word with it, then the nearest words."""
    words = [
        [c.text for c in match.others if c.shares_word] + [c.text for c in match.others if c.is_word and not c.shares_word]
        for match in matches
    ]
    return list(dict.fromkeys(text for rank in itertools.zip_longest(*words) for text in rank if text is not None))


def to_texts(matches: Sequence[SynonymMatch]) -> list[list[list[str]]]:
    """The candidates of each concept that are synonyms, those that are something else, and the undecided."""
    return [[[candidate.text for candidate in side] for side in (m.synonyms, m.others, m.undecided)] for m in matches]


def to_matches(prompts: PromptTable, texts: list[list[list[str]]]) -> list[SynonymMatch]:
    """The inverse of `to_texts`; on another machine some may be no candidates."""
    known = [{candidate.text: candidate for candidate in group} for group in prompts.candidates]
    matches = []
    for own, sides in zip(known, texts, strict=True):
        synonyms, others, undecided = ([own[text] for text in side if text in own] for side in sides)
        matches.append(SynonymMatch(synonyms, others, undecided))
    return matches
