"""`--robust`: prompts that bring the concept back are found against the student, and erased as the concept is.

As in AdvUnlearn (arXiv 2405.15234) and STEREO (arXiv 2408.16807) erasure and attack take turns. What is found is the input
embedding of a new word. It stands in the concept's place in all of its prompts, and the student is given it where it was
given the concept, towards the same target.
"""

import contextlib
import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from esd_peft.attacks.inversion import learn_words
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.prompts.plan import Pair, PromptPlan
from esd_peft.prompts.table import PairTable, make_table
from esd_peft.runtime import distributed
from esd_peft.runtime.seeds import generator as named_generator
from esd_peft.training.batches import Batch, BatchSampler, Sampler
from esd_peft.training.options import BufferOptions, TrainingOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import SEARCH_BATCH_SIZE, SEARCH_STEPS, SEARCH_TRAJECTORIES, nfe_per_sample, stage_ends

WORDS = 4  # found in a round, for each concept
NOISE = 0.3  # by which their starting points differ, in standard deviations of the vocabulary's embeddings


class AdversarialSampler(Sampler):
    """Batches of guided pairs, with more prompts in each stage, and a buffer of its own for each."""

    def __init__(
        self,
        rollout: Rollout,
        plan: PromptPlan,
        table: PairTable,
        buffer: BufferOptions,
        training: TrainingOptions,
        generator: torch.Generator,
    ) -> None:
        self.rollout, self.plan, self.table, self.buffer, self.training = rollout, plan, table, buffer, training
        self.ends = stage_ends(training)
        self.words: list[dict[str, Tensor]] = []  # round by round each concept's, by text encoder
        self.taken = self.stage = 0
        self.sampler = BatchSampler(rollout, table, buffer, training, generator)

    def __next__(self) -> Batch:
        if self.taken == self.ends[self.stage]:
            self._start(self.stage + 1)
        batch = next(self.sampler)
        self.taken += 1
        return batch

    def _start(self, stage: int) -> None:
        table = self._extended_table(stage)
        generator = named_generator(self.training.seed, f"robust/{stage}")
        self.sampler = BatchSampler(self.rollout, table, self.buffer, self.training, generator)
        self.stage = stage

    def state_dict(self) -> dict[str, Any]:
        """See `batches.Sampler`."""
        return self.sampler.state_dict() | {"total": self.taken, "words": self.words}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `batches.Sampler`."""
        self.taken = int(state["total"])
        self.words = [{str(name): value for name, value in words.items()} for words in state["words"]]
        stage = next(i for i, end in enumerate(self.ends) if self.taken <= end)
        if stage:
            self._start(stage)
        self.sampler.load_state_dict(state)

    def _extended_table(self, rounds: int) -> PairTable:
        """The table with the words of so many rounds; finds those that are not known yet.

        Text encoders are on the device meanwhile.
        """
        rollout, plan, student = self.rollout, self.plan, self.rollout.student
        numbers = itertools.product(range(rounds), range(len(plan.concept_pairs)))
        with rollout.profiler.phase("attack"), contextlib.ExitStack() as known:
            encoders = load_encoders(student.family, student.device, student.dtype)
            victim = Victim(student.family, student.denoiser, encoders, student.device, student.dtype)
            concept_pairs = [[*pairs] for pairs in plan.concept_pairs]
            for number, k in numbers:
                tokens = NewTokens(encoders, [f"<found{number}x{k}x{i}>" for i in range(WORDS)])
                known.enter_context(tokens.known())
                index = number * len(plan.concept_pairs) + k
                if index == len(self.words):
                    self._find(victim, tokens, k, number)
                    self.words.append({name: value.detach().cpu() for name, value in tokens.embeddings.items()})
                tokens.embeddings = {name: value.to(student.device) for name, value in self.words[index].items()}
                concept_pairs[k] += self._with(tokens.words, k)
            plan = dataclasses.replace(plan, concept_pairs=concept_pairs)
            return make_table(plan, victim.encode_frozen(plan.paired_texts))

    def _with(self, words: list[str], k: int) -> list[Pair]:
        """Concept k's pairs with each of the `words` in its place, where it is named as one piece."""
        concept = self.plan.concepts[k]
        named = [pair for pair in self.plan.concept_pairs[k] if concept in pair.prompt]
        return [dataclasses.replace(p, adversarial=p.prompt.replace(concept, word)) for p in named for word in words]

    def _find(self, victim: Victim, tokens: NewTokens, k: int, number: int) -> None:
        """Let `tokens` be words with which the student predicts what the teacher does for concept k."""
        rollout, student, concept = self.rollout, self.rollout.student, self.plan.concepts[k]
        draws = named_generator(self.training.seed, f"robust/{number}/{k}")
        tokens.start_from(concept, NOISE, draws)
        options = self.buffer.replace(rollout="teacher", guided_rollout_ratio=0.0)
        rows = torch.tensor([*itertools.islice(itertools.cycle(self.table.concepts[k]), SEARCH_TRAJECTORIES)])
        with rollout.profiler.phase("rollout"):
            samples = rollout.collect(self.table, rows, options, draws, progress=False)
        prompts = {row: pair.prompt for row, pair in zip(self.table.concepts[k], self.plan.concept_pairs[k], strict=True)}

        def loss() -> Tensor:
            chosen = torch.randint(len(samples), (SEARCH_BATCH_SIZE,), generator=draws)
            batch = samples.index(chosen, student.device)
            words = itertools.cycle(tokens.words)
            texts = [prompts[row].replace(concept, next(words)) for row in samples.pairs[chosen].tolist()]
            prediction = student.predict(batch.inputs, batch.timesteps, victim.encode(texts))
            rollout.profiler.nfe += nfe_per_sample(student.denoiser.is_gradient_checkpointing) * SEARCH_BATCH_SIZE
            return (prediction.float() - batch.teacher[1].float()).square().mean()

        for _ in itertools.islice(learn_words(tokens, loss), SEARCH_STEPS):
            distributed.stop_here()
