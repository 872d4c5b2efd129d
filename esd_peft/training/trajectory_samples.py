"""The concepts' own trajectories as samples: what the method `trajectories` learns from.

A sampling step with classifier-free guidance already computes e_null and e_concept at (x_t, t), which is all that the target
needs. So the buffer that rollouts fill holds the teacher's answers, and training reads them from it.
"""

from typing import Any

import torch
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.models.family import index_embeds
from esd_peft.options.training import BufferOptions, TrainingOptions
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.devices import send
from esd_peft.training.batch import Batch, Source
from esd_peft.training.buffer import Buffer
from esd_peft.training.learners import PREDICTION, Outputs
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import buffer_shape, preservation_samples


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


class TrajectorySamples(Source):
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
        self.shape = buffer_shape(buffer, training, len(table) - table.num_concept_pairs)
        self.taken = self.fills = 0
        self.sizes: Outputs = {}
        self.orders = [torch.randperm(len(pairs) - 1, generator=generator).tolist() for pairs in table.concepts]

    def __next__(self) -> Batch:
        interval = self.options.buffer_refresh_interval
        if not self.taken or (interval and self.taken % interval == 0):
            self._refresh()
        held, neutral = self._choose_preserved()
        index = torch.tensor([*self.concept_samples.take(self.num_concept_samples), *held])
        self.taken += 1
        samples = self.buffer.index(index, self.rollout.student.device)
        return collate(samples, self.table, self.sizes, self.num_concept_samples, neutral, self.unprompted_guidance)

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
        if not self.sizes:  # by the first samples, so that the unit of the loss stays the same
            erases = self.buffer.pairs < self.table.num_concept_pairs
            null, named = self.buffer.teacher[:2, erases].float()
            self.sizes = {PREDICTION: send((named - null).square().mean(), self.rollout.student.device)}

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
        """See `Source`."""
        if not self.taken:
            return {"taken": 0, "buffer": None}
        return {
            "taken": self.taken,
            "before": self.before,
            "generator": self.generator.get_state(),
            "sizes": self.sizes,
            "shuffled": [s.state_dict() for s in (self.concept_samples, self.neutral_samples, self.preserved_samples)],
            "buffer": {**vars(self.buffer)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`. It must be as it was made, its generator too. Raises `UserError` if it cannot go on."""
        self.taken = int(state["taken"])
        if not self.taken:
            return
        if state["buffer"] is None and self.options.rollout == "student":
            raise UserError(
                "--resume: the checkpoint's buffer is damaged, and the student that filled it has learned since; add "
                "--overwrite to start anew"
            )
        self.before = state["before"]
        self.sizes = {name: size.to(self.rollout.student.device) for name, size in state["sizes"].items()}
        self.generator.set_state(self.before)
        self.fills = (self.taken - 1) // (self.options.buffer_refresh_interval or self.taken)
        if state["buffer"] is None:
            with self.rollout.profiler.uncounted():  # the first filling is a part of what the checkpoint has counted
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
    samples: Buffer,
    table: PairTable,
    sizes: Outputs,
    num_concept_samples: int,
    neutral: list[bool],
    unprompted_guidance: float = 0.0,
) -> Batch:
    """The batch in which the first `num_concept_samples` samples erase and the others preserve what the teacher says.

    A preservation sample is given its pair's neutral prompt (where `neutral` says so), its target being e_null (η = 0, or
    `unprompted_guidance`), or its own prompt, the target being e_concept (η = −1). Without any, the prediction without the
    concept moves along with the one that names it, and classifier-free guidance, which amplifies their difference, undoes
    part of the erasure.
    """
    rows, etas = table.prompts[samples.pairs], table.etas[samples.pairs]
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
    return Batch(
        {"inputs": samples.inputs, "timesteps": samples.timesteps},
        index_embeds(table.embeds, rows),
        {PREDICTION: samples.teacher[:2].flatten(0, 1)},
        etas,
        weights,
        None if anchor is None else {PREDICTION: anchor},
        sizes,
        num_concept_samples,
    )
