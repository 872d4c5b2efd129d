"""Batches of training samples without end, and where they stand, so that another run goes on from there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.models import PromptEmbeds
from esd_peft.models.family import index_embeds
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.devices import send
from esd_peft.training.buffer import Buffer
from esd_peft.training.names import Verdict
from esd_peft.training.options import BufferOptions, TrainingOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import buffer_shape, preservation_samples


@dataclass
class Batch:
    """What the student is given, and what its prediction is held against. `B` samples on the training device."""

    inputs: Tensor  # [B, ...] x_t as the denoiser is fed it
    timesteps: Tensor  # [B]
    embeds: PromptEmbeds  # [B, ...] each
    teacher: Tensor  # [2B, ...] e_null, then e_concept (guided pairs); or the noise, then the references (contrastive)
    eta: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32
    anchor: Tensor | None = None  # [B, ...]
    num_concept_samples: int = 0  # how many of the samples erase

    def __len__(self) -> int:
        return len(self.timesteps)

    def split(self, size: int, of: range) -> Iterator["Batch"]:
        """The samples `of` it, up to `size` at a time, weighted so that the parts' losses add up to the batch's."""
        sides = self.teacher.unflatten(0, (2, -1))
        for start in of[::size]:
            part = slice(start, min(start + size, of.stop))
            share = (part.stop - part.start) / len(self)
            yield Batch(
                self.inputs[part],
                self.timesteps[part],
                {name: value[part] for name, value in self.embeds.items()},
                sides[:, part].flatten(0, 1),
                self.eta[part],
                self.weight[part] if share == 1 else self.weight[part] * share,
                None if self.anchor is None else self.anchor[part],
            )


class Sampler(Protocol):
    """What training takes its batches from."""

    verdicts: Sequence[Verdict] = ()  # which words it found to be other names for each concept, where it looks for some

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: JSON values and tensors, the buffer under "buffer"."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the same batches that would have come; a buffer that is None is filled anew."""

    def load_verdicts(self, texts: list[list[list[str]]]) -> None:
        """All that is of use of a training that is done: `names.to_texts` of its verdicts."""
        return


class Shuffled:
    """Items in random order, then again in another, without end."""

    def __init__(self, items: Tensor, generator: torch.Generator) -> None:
        self.items, self.generator = items, generator
        self.order: list[int] = []
        self.position = 0

    def take(self, count: int) -> list[int]:
        """The next `count` of them."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        if self.position == len(self.order):
            self.order = self.items[torch.randperm(len(self.items), generator=self.generator)].tolist()
            self.position = 0
        self.position += 1
        return self.order[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = [int(i) for i in state["order"]], int(state["position"])
        if not set(self.order) <= set(self.items.tolist()) or not 0 <= self.position <= len(self.order):
            raise ValueError("an order of other samples")


class BatchSampler(Sampler):
    """Batches of guided pairs, from a buffer that rollouts fill.

    A buffer that is filled once is reshuffled when it is used up; otherwise it is filled anew every
    `buffer_refresh_interval` steps, with as many samples as they take. The time goes to the phase "rollout".
    """

    def __init__(
        self,
        rollout: Rollout,
        table: PairTable,
        buffer: BufferOptions,
        training: TrainingOptions,
        generator: torch.Generator,
    ) -> None:
        self.rollout, self.table, self.options, self.generator = rollout, table, buffer, generator
        self.num_preserve_samples = preservation_samples(training)
        self.num_concept_samples = training.train_batch_size - self.num_preserve_samples
        self.unprompted_guidance = training.unprompted_guidance
        self.shape = buffer_shape(buffer, training)
        self.taken = self.fills = 0
        self.orders = [torch.randperm(len(pairs) - 1, generator=generator).tolist() for pairs in table.concepts]

    def __next__(self) -> Batch:
        interval = self.options.buffer_refresh_interval
        if not self.taken or (interval and self.taken % interval == 0):
            self._refresh()
        held, neutral = self._choose_preserved()
        index = torch.tensor([*self.concept_samples.take(self.num_concept_samples), *held])
        self.taken += 1
        samples = self.buffer.index(index, self.rollout.student.device)
        return collate(samples, self.table, self.num_concept_samples, neutral, self.unprompted_guidance)

    def _refresh(self) -> None:
        """Fill the buffer; if that is interrupted the sampler stands where it stood."""
        before = self.generator.get_state()
        try:
            self._fill()
        except BaseException:
            self.generator.set_state(before)
            raise
        self.before = before
        self._shuffle()

    def _fill(self) -> None:
        """Collect the trajectories that are next."""
        first = self.fills * self.shape.concept_trajectories
        pairs = [self._concept_pair(number) for number in range(first, first + self.shape.concept_trajectories)]
        preserved, first = len(self.table) - self.table.num_concept_pairs, self.fills * self.shape.preserve_trajectories
        pairs += [
            self.table.num_concept_pairs + number % preserved
            for number in range(first, first + self.shape.preserve_trajectories)
        ]
        with self.rollout.profiler.phase("rollout"):
            self.buffer = self.rollout.collect(
                self.table, torch.tensor(pairs), self.options, self.generator, self.shape.keep,
                progress=not self.options.buffer_refresh_interval,
            )  # fmt: skip
        self.fills += 1

    def _concept_pair(self, number: int) -> int:
        """The pair of trajectory `number`: concepts by turns; of each the plain prompt first, then the others in random
        order, and again."""
        turn, concept = divmod(number, len(self.table.concepts))
        plain, *others = self.table.concepts[concept]
        return [plain, *(others[i] for i in self.orders[concept])][turn % (1 + len(others))]

    def _shuffle(self) -> None:
        erases = self.buffer.pairs < self.table.num_concept_pairs
        concepts, preserved = (which.nonzero().squeeze(1) for which in (erases, ~erases))
        self.concept_samples = Shuffled(concepts, self.generator)
        self.neutral_samples = Shuffled(concepts, self.generator)
        self.preserved_samples = Shuffled(preserved, self.generator)

    def _choose_preserved(self) -> tuple[list[int], list[bool]]:
        """Preservation samples of a batch, and whether they are given the prompt without the concept: where there are
        trajectories of prompts to preserve, these and the concepts' take turns."""
        if not len(self.preserved_samples.items):
            return self.neutral_samples.take(self.num_preserve_samples), [True] * self.num_preserve_samples
        first = self.taken * self.num_preserve_samples
        neutral = [number % 2 == 1 for number in range(first, first + self.num_preserve_samples)]
        return [(self.neutral_samples if n else self.preserved_samples).take(1)[0] for n in neutral], neutral

    def state_dict(self) -> dict[str, Any]:
        """See `Sampler`."""
        if not self.taken:
            return {"taken": 0, "buffer": None}
        return {
            "taken": self.taken,
            "before": self.before,
            "generator": self.generator.get_state(),
            "shuffled": [s.state_dict() for s in (self.concept_samples, self.neutral_samples, self.preserved_samples)],
            "buffer": {**vars(self.buffer)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Sampler`. It must be as it was made, its generator too. Raises `UserError` if it cannot go on."""
        self.taken = int(state["taken"])
        if not self.taken:
            return
        if state["buffer"] is None and self.options.rollout == "student":
            raise UserError(
                "--resume: the checkpoint's buffer is damaged, and the student that filled it has learned since; add "
                "--overwrite to start anew"
            )
        self.before = state["before"]
        self.generator.set_state(self.before)
        self.fills = (self.taken - 1) // (self.options.buffer_refresh_interval or self.taken)
        if state["buffer"] is None:
            self._fill()
        else:
            self.buffer = Buffer(**state["buffer"])
            self.fills += 1
        self._shuffle()
        shuffled = (self.concept_samples, self.neutral_samples, self.preserved_samples)
        for one, given in zip(shuffled, state["shuffled"], strict=True):
            one.load_state_dict(given)
        self.generator.set_state(state["generator"])


def collate(
    samples: Buffer, table: PairTable, num_concept_samples: int, neutral: list[bool], unprompted_guidance: float = 0.0
) -> Batch:
    """The batch in which the first `num_concept_samples` samples erase and each other one holds the student to the teacher.

    A preservation sample is given its pair's neutral prompt (where `neutral` says so), its target being e_null (η = 0, or
    `unprompted_guidance`), or its own prompt, the target being e_concept (η = −1). Without any, the prediction without the
    concept moves along with the one that names it, and classifier-free guidance, which amplifies their difference, undoes
    part of the erasure.
    """
    rows, etas = table.student_prompts[samples.pairs], table.etas[samples.pairs]
    weights = table.weights[samples.pairs]
    anchor = None if table.anchors is None else samples.teacher[2]
    if neutral:
        is_neutral = send(torch.tensor(neutral), samples.pairs.device)
        held = slice(num_concept_samples, None)
        rows[held] = torch.where(is_neutral, table.neutrals[samples.pairs][held], rows[held])
        etas[held] = torch.where(is_neutral, unprompted_guidance, -1.0)
        weights[held] = 1.0
        if anchor is not None:
            anchor = torch.cat([anchor[:num_concept_samples], samples.teacher[0, held]])
    embeds = index_embeds(table.embeds, rows)
    pair = samples.teacher[:2].flatten(0, 1)
    return Batch(samples.inputs, samples.timesteps, embeds, pair, etas, weights, anchor, num_concept_samples)
