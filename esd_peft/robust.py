"""Rounds of `--robust`: words that bring the concept back are found against the student, and erased as the concept is.

As in AdvUnlearn (arXiv 2405.15234) and STEREO (arXiv 2408.16807) attack and erasure take turns. What is found here is the
input embedding of a new word, so that all the rest, wordings, pairs and the closed form, is as for the concept's own word.
"""

import contextlib
import dataclasses
import itertools

import torch
from torch import Tensor

from esd_peft.attacks.inversion import BATCH_SIZE, learn_words
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim
from esd_peft.backbones import PromptEmbeds
from esd_peft.concepts import Pair, PromptPlan
from esd_peft.randomness import generator
from esd_peft.rollout import Rollout

WORDS = 4  # found in a round, for each concept
STEPS = 60
TRAJECTORIES = 4  # of the teacher, for each concept
NOISE = 1.0
LR = 0.02


class Sparring:
    """Finds words against the student as it is; keeps the text encoders on the device for that."""

    def __init__(self, rollout: Rollout, plan: PromptPlan) -> None:
        self.rollout = dataclasses.replace(rollout, config=rollout.config.model_copy(update={"anticipate": 0}))
        self.plan, self.known = plan, contextlib.ExitStack()
        encoders = rollout.backbone.assemble(rollout.backbone.text_parts, rollout.dtype).to(rollout.device)
        self.victim = Victim(rollout.backbone, rollout.denoiser, encoders, rollout.device, rollout.dtype)
        draws = generator(rollout.config.seed, "robust")
        self.banks = [
            self.rollout.fill(torch.tensor([*itertools.islice(itertools.cycle(rows), TRAJECTORIES)]), draws)
            for rows in rollout.table.concepts
        ]
        self.wordings = plan.erasing

    def meet(self, number: int) -> tuple[PromptPlan, PromptEmbeds]:
        """The plan with what is found in this round, and the embeddings of all its texts."""
        erasing = []
        for k, concept in enumerate(self.rollout.config.concept_names):
            found = self._find(k, concept, number)
            erasing.append([*self.plan.erasing[k], *found])
        self.plan = dataclasses.replace(self.plan, erasing=erasing)
        with torch.no_grad():
            batches = [self.victim.encode(self.plan.texts[i : i + 16]) for i in range(0, len(self.plan.texts), 16)]
        return self.plan, {name: torch.cat([b[name] for b in batches]) for name in batches[0]}

    def _find(self, k: int, concept: str, number: int) -> list[Pair]:
        """Words that make the student predict what the teacher predicts for concept k, in all of its wordings."""
        rollout, bank = self.rollout, self.banks[k]
        draws = generator(rollout.config.seed, f"robust/{k}/{number}")
        words = [f"<found{k}x{number}x{i}>" for i in range(WORDS)]
        tokens = NewTokens(self.victim.encoders, words)
        tokens.start_from(concept, NOISE, draws)
        self.known.enter_context(tokens.known())
        first = rollout.table.concepts[k][0]

        def loss() -> Tensor:
            index = torch.randint(len(bank), (BATCH_SIZE,), generator=draws)
            tuples = bank.take(index, rollout.device)
            asked = [self.wordings[k][pair - first].prompt for pair in bank.pairs[index].tolist()]
            embeds = self.victim.encode([p.replace(concept, words[i % WORDS]) for i, p in enumerate(asked)])
            with rollout.autocast():
                seen = rollout.backbone.predict(rollout.denoiser, tuples.inputs.to(rollout.dtype), tuples.timesteps, embeds)
            rollout.costs.forward_equivalents += 3 * BATCH_SIZE
            return (seen.float() - tuples.teacher[1].float()).square().mean()

        steps = [*itertools.islice(learn_words(tokens, loss, LR), STEPS)]
        print("robust", number, sum(steps[:10]) / 10, sum(steps[-10:]) / 10)
        return [
            dataclasses.replace(pair, found=pair.prompt.replace(concept, word))
            for pair in self.wordings[k]
            for word in words
        ]
