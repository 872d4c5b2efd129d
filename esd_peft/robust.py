"""Rounds of `--robust`: words that bring the concept back are found against the student, and erased as the concept is.

As in AdvUnlearn (arXiv 2405.15234) and STEREO (arXiv 2408.16807) attack and erasure take turns. What is found is the input
embedding of a new word. It stands in the concept's place in all of its wordings, and the student is asked with it what it is
asked with the concept, towards the same target. The closed form is not solved again for it: that was tried, and the concept
came back more easily (docs/attacks.md).
"""

import contextlib
import dataclasses
import itertools

import torch
from torch import Tensor

from esd_peft.adapters import Student
from esd_peft.attacks.inversion import BATCH_SIZE, learn_words
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.concepts import Pair, PromptPlan
from esd_peft.distill import distill
from esd_peft.objectives import Objective
from esd_peft.randomness import generator
from esd_peft.rollout import Rollout, make_table
from esd_peft.tracking import Report

WORDS = 2  # found in a round, for each concept
STEPS = 60  # of the search, in which they learn side by side
LEARNING_RATE = 0.05
NOISE = 0.3  # by which their starting points differ, in standard deviations of the vocabulary's embeddings
TRAJECTORIES = 4  # of the teacher, for each concept, along which they are found


def harden(student: Student, objective: Objective, plan: PromptPlan, draws: torch.Generator, report: Report) -> list[float]:
    """The config's rounds: find words, then train `student` on with all that were found.

    Returns the losses as `distill` does. Text encoders are on the device meanwhile.
    """
    rollout = objective.rollout
    sparring = Sparring(rollout, plan)
    losses: list[float] = []
    with sparring.known:
        for number in range(rollout.config.robust):
            with rollout.costs.phase("attack"):
                plan = sparring.meet(number)
                rollout.table = make_table(plan, sparring.victim.told(plan.texts))
            losses += distill(student, objective, draws, report=report)
    return losses


class Sparring:
    """The attacker: knows the student as it is, and what the teacher predicts for the concept."""

    def __init__(self, rollout: Rollout, plan: PromptPlan) -> None:
        config = rollout.config
        self.rollout = dataclasses.replace(rollout, config=config.model_copy(update={"anticipate": 0}))
        self.plan, self.pairs, self.known = plan, plan.erasing, contextlib.ExitStack()
        encoders = load_encoders(rollout.backbone, rollout.device, rollout.dtype)
        self.victim = Victim(rollout.backbone, rollout.denoiser, encoders, rollout.device, rollout.dtype)
        with rollout.costs.phase("rollout"):
            self.banks = [
                self.rollout.fill(torch.tensor([*itertools.islice(itertools.cycle(rows), TRAJECTORIES)]),
                                  generator(config.seed, f"robust/bank/{k}"), progress=False)
                for k, rows in enumerate(rollout.table.concepts)
            ]  # fmt: skip

    def meet(self, number: int) -> PromptPlan:
        """The plan, with what round `number` finds besides what was found before."""
        erasing = [[*pairs, *self._find(k, number)] for k, pairs in enumerate(self.plan.erasing)]
        self.plan = dataclasses.replace(self.plan, erasing=erasing)
        return self.plan

    def _find(self, k: int, number: int) -> list[Pair]:
        """Words with which the student predicts what the teacher does for concept k; each in all of its wordings."""
        rollout, bank, concept = self.rollout, self.banks[k], self.rollout.config.concept_names[k]
        draws = generator(rollout.config.seed, f"robust/{k}/{number}")
        words = [f"<found{k}x{number}x{i}>" for i in range(WORDS)]
        tokens = NewTokens(self.victim.encoders, words)
        tokens.start_from(concept, NOISE, draws)
        self.known.enter_context(tokens.known())
        asked = {row: pair.prompt for row, pair in zip(rollout.table.concepts[k], self.pairs[k], strict=True)}

        def loss() -> Tensor:
            chosen = torch.randint(len(bank), (BATCH_SIZE,), generator=draws)
            tuples = bank.take(chosen, rollout.device)
            prompts = [asked[row] for row in bank.pairs[chosen].tolist()]
            embeds = self.victim.encode([p.replace(concept, words[i % WORDS]) for i, p in enumerate(prompts)])
            with rollout.autocast():
                inputs = tuples.inputs.to(rollout.dtype)
                seen = rollout.backbone.predict(rollout.denoiser, inputs, tuples.timesteps, embeds)
            rollout.costs.forward_equivalents += 3 * BATCH_SIZE
            return (seen.float() - tuples.teacher[1].float()).square().mean()

        for _ in itertools.islice(learn_words(tokens, loss), STEPS):
            pass
        wordings = [pair for pair in self.pairs[k] if concept in pair.prompt]
        return [dataclasses.replace(p, found=p.prompt.replace(concept, word)) for p in wordings for word in words]
