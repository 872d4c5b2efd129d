"""`--robust`: words that bring the concept back are found against the student, and erased as the concept is.

As in AdvUnlearn (arXiv 2405.15234) and STEREO (arXiv 2408.16807) erasure and attack take turns. What is found is the input
embedding of a new word. It stands in the concept's place in all of its wordings, and the student is asked with it what it is
asked with the concept, towards the same target.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esd_peft.attacks.attack import BATCH_SIZE
from esd_peft.attacks.inversion import learn_words
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.prompts.plan import Pair, PromptPlan
from esd_peft.runtime import interrupts
from esd_peft.runtime.seeds import generator as named_generator
from esd_peft.training.esd import Batch, GuidedTarget, Supply
from esd_peft.training.rollout import PairTable, make_table

WORDS = 4  # found in a round, for each concept
STEPS = 60  # of the search, in which they learn side by side
NOISE = 0.3  # by which their starting points differ, in standard deviations of the vocabulary's embeddings
TRAJECTORIES = 4  # of the teacher, for each concept, along which they are found


def steps_of_rounds(steps: int, rounds: int) -> list[int]:
    """How many of all optimizer steps come before the first round, and after each one: of the latter twice as many."""
    first = steps // (1 + 2 * rounds)
    parts = [first] + [2 * first] * rounds
    parts[-1] += steps - sum(parts)
    return parts


def round_forwards(num_inference_steps: int, rows: int) -> int:
    """Forward-equivalents that a round's search takes for each concept, of trajectories with `rows` predictions a step."""
    return TRAJECTORIES * num_inference_steps * rows + STEPS * 3 * BATCH_SIZE


@dataclass
class RobustTarget(GuidedTarget):
    """The guided target, for more and more prompts. Each round has a bank of its own."""

    plan: PromptPlan
    _plain: PairTable = field(init=False)
    _words: list[dict[str, Tensor]] = field(default_factory=list)  # round by round each concept's, by text encoder

    def __post_init__(self) -> None:
        self._plain = self.rollout.table

    @property
    def parts(self) -> list[int]:
        """Adam remembers the large gradients of the start for longer than a round, in which it would hardly move."""
        (steps,) = super().parts
        return steps_of_rounds(steps, self.rollout.config.robust)

    def batches(self, generator: torch.Generator, resume: Supply | None = None) -> Iterator[Batch]:
        config, taken, begun = self.rollout.config, 0, 0
        if resume is not None:
            taken, self._words = resume.taken, [*resume.words]
        for number, steps in enumerate(self.parts):
            if taken < begun + steps:
                here = None
                if resume is not None and taken > begun:
                    here = dataclasses.replace(resume, taken=taken - begun)
                if number:
                    self._meet(number)
                    generator = named_generator(config.seed, f"robust/{number}")
                yield from itertools.islice(super().batches(generator, here), begun + steps - max(taken, begun))
            begun += steps

    def supply(self, taken: int) -> Supply:
        return dataclasses.replace(super().supply(taken), words=self._words)

    def _meet(self, rounds: int) -> None:
        """Let the table have the words of so many rounds; finds those that are not known yet.

        Text encoders are on the device meanwhile.
        """
        rollout, plan = self.rollout, self.plan
        numbers = itertools.product(range(rounds), range(len(plan.erasing)))
        with rollout.costs.phase("attack"), contextlib.ExitStack() as known:
            encoders = load_encoders(rollout.backbone, rollout.device, rollout.dtype)
            victim = Victim(rollout.backbone, rollout.denoiser, encoders, rollout.device, rollout.dtype)
            erasing = [[*pairs] for pairs in plan.erasing]
            for number, k in numbers:
                tokens = NewTokens(encoders, [f"<found{number}x{k}x{i}>" for i in range(WORDS)])
                known.enter_context(tokens.known())
                index = number * len(plan.erasing) + k
                if index == len(self._words):
                    self._find(victim, tokens, k, number)
                    self._words.append({name: value.detach().cpu() for name, value in tokens.embeddings.items()})
                tokens.embeddings = {name: value.to(rollout.device) for name, value in self._words[index].items()}
                erasing[k] += self._with(tokens.words, k)
            plan = dataclasses.replace(plan, erasing=erasing)
            rollout.table = make_table(plan, victim.told(plan.paired_texts))

    def _with(self, words: list[str], k: int) -> list[Pair]:
        """Concept k's pairs with each of the `words` in its place, where it is named as one piece."""
        concept = self.rollout.config.concept_names[k]
        named = [pair for pair in self.plan.erasing[k] if concept in pair.prompt]
        return [dataclasses.replace(p, found=p.prompt.replace(concept, word)) for p in named for word in words]

    def _find(self, victim: Victim, tokens: NewTokens, k: int, number: int) -> None:
        """Let `tokens` be words with which the student predicts what the teacher does for concept k."""
        rollout, concept = self.rollout, self.rollout.config.concept_names[k]
        draws = named_generator(rollout.config.seed, f"robust/{number}/{k}")
        tokens.start_from(concept, NOISE, draws)
        driven = rollout.config.model_copy(update={"rollout": "teacher", "anticipate": 0.0})
        rows = torch.tensor([*itertools.islice(itertools.cycle(self._plain.concepts[k]), TRAJECTORIES)])
        with rollout.costs.phase("rollout"):
            bank = dataclasses.replace(rollout, config=driven, table=self._plain).fill(rows, draws, progress=False)
        asked = {row: pair.prompt for row, pair in zip(self._plain.concepts[k], self.plan.erasing[k], strict=True)}

        def loss() -> Tensor:
            chosen = torch.randint(len(bank), (BATCH_SIZE,), generator=draws)
            tuples = bank.take(chosen, rollout.device)
            prompts = [asked[row] for row in bank.pairs[chosen].tolist()]
            words = itertools.cycle(tokens.words)
            embeds = victim.encode([prompt.replace(concept, next(words)) for prompt in prompts])
            with rollout.autocast():
                seen = rollout.backbone.predict(rollout.denoiser, tuples.inputs.to(rollout.dtype), tuples.timesteps, embeds)
            rollout.costs.forward_equivalents += 3 * BATCH_SIZE
            return (seen.float() - tuples.teacher[1].float()).square().mean()

        for _ in itertools.islice(learn_words(tokens, loss), STEPS):
            interrupts.stop_here()
