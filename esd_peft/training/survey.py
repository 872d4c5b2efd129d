"""What the teacher draws along a few trajectories, and which words are other names for a concept there.

Of the trajectories some are the concepts', the others those of the nearest words that are held, and of random words.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.prompts.plan import Pair, PromptPlan
from esd_peft.prompts.table import make_table
from esd_peft.prompts.wordings import Wordings
from esd_peft.runtime import distributed
from esd_peft.training.buffer import Buffer, concatenate
from esd_peft.training.names import Verdict, judge, near, to_texts, to_verdicts
from esd_peft.training.options import BufferOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import other_trajectories, own_trajectories, survey_rollout

Watch = Callable[[torch.Generator], contextlib.AbstractContextManager[None]]


@dataclass
class Survey:
    """What was seen. A pair is a trajectory here: `each` of the first concept, of the second, ..., then the others."""

    samples: Buffer  # of all trajectories; `teacher` has e_null and e_concept
    verdicts: list[Verdict]  # of each concept's candidates
    each: int

    @property
    def own(self) -> int:
        """How many trajectories are the concepts'."""
        return self.each * len(self.verdicts)

    def concept_of(self, pairs: Tensor) -> Tensor:
        """Of each of the `pairs` the concept along whose trajectory it lies, int64; −1: none."""
        return torch.where(pairs < self.own, pairs // self.each, -1)


def survey(
    rollout: Rollout,
    wordings: Wordings,
    options: BufferOptions,
    draws: torch.Generator,
    watching: Watch = lambda draws: contextlib.nullcontext(),
) -> Survey:
    """Run the trajectories, `watching` each time, and judge the candidates along the concepts' own.

    Each process runs all trajectories, as there are few.
    """
    options, concepts = survey_rollout(options), [pairs[0] for pairs in wordings.plain]
    rollout = dataclasses.replace(rollout, shared=False)
    each, cpu = own_trajectories(len(concepts)), torch.device("cpu")

    def drive(plan: PromptPlan) -> Buffer:
        rows, device = wordings.index(plan.texts), rollout.student.device
        table = make_table(plan, {name: value[rows].to(device) for name, value in wordings.embeds.items()})
        with watching(draws):
            return rollout.collect(table, torch.arange(len(table)), options, draws, progress=False)

    own = drive(PromptPlan([p.prompt for p in concepts], [[p] * each for p in concepts], [], []))
    verdicts = []
    for number in range(len(concepts)):
        mine = range(number * each, (number + 1) * each)
        along = [own.index((own.pairs == pair).nonzero().squeeze(1), cpu) for pair in mine]
        verdicts.append(judge(rollout.student, wordings, number, along, 2 * options.rollout_batch_size))
        rollout.profiler.nfe += verdicts[-1].nfe
    if distributed.world_size() > 1:  # one cosine on the other side of a bound would lead to other draws ever after
        verdicts = to_verdicts(wordings, distributed.broadcast(to_texts(verdicts)))
    chosen = _others(wordings, verdicts, other_trajectories(len(concepts)), draws)
    others = drive(PromptPlan([], [], [Pair(text, "") for text in chosen], []))
    own = dataclasses.replace(own, teacher=own.teacher[:2])
    others = dataclasses.replace(others, pairs=others.pairs + each * len(concepts))
    return Survey(concatenate([own, others]), verdicts, each)


def _others(wordings: Wordings, verdicts: list[Verdict], count: int, draws: torch.Generator) -> list[str]:
    """`count` prompts: a half neighbours of the concepts, the nearest of each first, as far as there are any; the rest
    random words."""
    ranked = near(verdicts)
    chosen = ranked[: count // 2]
    far = [text for word in wordings.words if (text := f"a {word}") not in ranked]
    return chosen + [far[i] for i in torch.randperm(len(far), generator=draws)[: count - len(chosen)].tolist()]
