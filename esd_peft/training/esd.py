"""What a training step asks the student, and the loss on its answer.

The guided target `e_anchor − η · (e_concept − e_null)` is a linear combination of predictions whose coefficients
add up to one. Velocity and flow predictions are linear in ε for a given x_t, so the target holds for them as it
stands, as long as the student is compared in the same parameterisation.
"""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from esd_kernels import guided_mse
from esd_peft.config import EraseConfig
from esd_peft.models import PromptEmbeds
from esd_peft.models.family import pick
from esd_peft.runtime.devices import send
from esd_peft.training.rollout import Bank, PairTable, Rollout


@dataclass
class Batch:
    """What the student is asked, and what its answer is held against. `B` samples on the training device."""

    inputs: Tensor  # [B, ...] x_t as the denoiser is fed it
    timesteps: Tensor  # [B]
    embeds: PromptEmbeds  # [B, ...] each
    teacher: Tensor  # [2B, ...] e_null, then e_concept (guided pairs); [B, ...] noise, then references (contrastive)
    eta: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32
    anchor: Tensor | None = None  # [B, ...]
    erasing: int = 0  # how many of the samples erase

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


@dataclass
class Supply:
    """Where an objective's batches stand."""

    taken: int
    before: Tensor | None = None  # the generator's state before the bank was filled
    bank: dict[str, Tensor] | None = None  # the bank, and the generator's state after it; none: to be filled again
    words: list[dict[str, Tensor]] = field(default_factory=list)  # that were found (`esd_peft.training.adversarial`)


class Objective(ABC):
    """An endless supply of batches, and a loss. Knows no pipeline family.

    Each brings the settings it works with, for where the config leaves them out.
    """

    weight_decay: ClassVar[float]
    train_batch_size: ClassVar[int]
    rollout: Rollout

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Peak learning rate."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps it takes."""

    @property
    def parts(self) -> list[int]:
        """The steps that are taken, the config's or else these; after each part the optimizer starts anew."""
        return [self.rollout.config.max_train_steps or self.steps]

    @property
    def batch_size(self) -> int:
        """Samples a step."""
        return self.rollout.config.train_batch_size or self.train_batch_size

    @abstractmethod
    def batches(self, generator: torch.Generator, resume: Supply | None = None) -> Iterator[Batch]:
        """Training batches without end. `generator` is as new, also where they go on from where others stopped."""

    def supply(self, taken: int) -> Supply:
        """Where the batches stand after `taken` of them, to go on from there."""
        return Supply(taken)

    @abstractmethod
    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """`[]` fp32, for the student's `prediction` `[B, ...]`: the mean over the samples, times their weights."""


@dataclass
class GuidedTarget(Objective):
    """The paper's objective (eq. 6) on a bank of guided pairs.

    A bank that is filled once is reshuffled when it is used up; otherwise it is filled for `steps_per_bank` steps at a
    time, with as many tuples as they take. Fill time goes to the phase "rollout".
    """

    weight_decay: ClassVar[float] = 0.0
    train_batch_size: ClassVar[int] = 8

    rollout: Rollout

    @property
    def learning_rate(self) -> float:
        """Fast where the null space holds everything else in place; see docs/scopes.md."""
        return 1e-2 if self.rollout.config.protected else 1e-3

    @property
    def steps(self) -> int:
        """The config's."""
        return self.rollout.config.guided_steps

    def batches(self, generator: torch.Generator, resume: Supply | None = None) -> Iterator[Batch]:
        config, table = self.rollout.config, self.rollout.table
        held = held_samples(config, self.batch_size)
        erasing = self.batch_size - held
        steps = config.steps_per_bank
        trajectories, preserving, keep = bank_shape(config, erasing, held, len(table.prompts) - table.erasing)
        erase, preserve = self._erase_in_turn(generator), self._preserve_in_turn()
        sides = itertools.cycle([False, True])
        skip = 0
        if resume is not None and resume.taken:
            filled = (resume.taken - 1) // steps if steps else 0  # banks before the one at hand
            skip = resume.taken - filled * (steps or 0)
            for turns, count in ((erase, trajectories), (preserve, preserving), (sides, held * (steps or 0))):
                _advance(turns, filled * count)
        while True:
            with self.rollout.costs.phase("rollout"):
                pairs = [*itertools.islice(erase, trajectories), *itertools.islice(preserve, preserving)]
                bank = self._filled(torch.tensor(pairs), generator, keep, resume if skip else None)
            erases = bank.pairs < table.erasing
            order = _shuffled(erases.nonzero().squeeze(1), generator)
            holds = _held(erases, sides, generator)
            for _ in itertools.count() if steps is None else range(steps):
                asked = [*itertools.islice(holds, held)]
                index = torch.tensor([*itertools.islice(order, erasing), *(i for i, _ in asked)])
                if skip:
                    skip -= 1
                    continue
                yield ask(bank.take(index, self.rollout.device), table, erasing, [neutral for _, neutral in asked])

    def _filled(self, pairs: Tensor, generator: torch.Generator, keep: int | None, resume: Supply | None) -> Bank:
        if resume is not None and resume.before is not None:
            generator.set_state(resume.before)
        before = generator.get_state()
        if resume is not None and resume.bank is not None:
            parts = dict(resume.bank)
            generator.set_state(parts.pop("after"))
            bank = Bank(**parts)
        else:
            bank = self.rollout.fill(pairs, generator, keep, progress=self.rollout.config.steps_per_bank is None)
        self._before, self._bank = before, {**vars(bank), "after": generator.get_state()}
        return bank

    def supply(self, taken: int) -> Supply:
        return Supply(taken, self._before, self._bank)

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Mean squared error to the guided target."""
        weight = batch.weight
        if self._snr_table is not None:
            weight = weight * self.rollout.backbone.noise_schedule.at_timesteps(self._snr_table, batch.timesteps)
        return guided_mse(prediction, batch.teacher, batch.eta, batch.anchor, weight)

    @functools.cached_property
    def _snr_table(self) -> Tensor | None:
        """The weight of every timestep of training, on the training device."""
        gamma, backbone = self.rollout.config.snr_gamma, self.rollout.backbone
        return None if gamma is None else send(backbone.noise_schedule.min_snr_weights(gamma), self.rollout.device)

    def _erase_in_turn(self, generator: torch.Generator) -> Iterator[int]:
        """Pairs, the concepts by turns; of each the plain wording first, then the others in random order, and again."""
        turns = []
        for plain, *others in self.rollout.table.concepts:
            order = torch.randperm(len(others), generator=generator).tolist()
            turns.append(itertools.cycle([plain, *(others[i] for i in order)]))
        for concept in itertools.cycle(turns):
            yield next(concept)

    def _preserve_in_turn(self) -> Iterator[int]:
        return itertools.cycle(range(self.rollout.table.erasing, len(self.rollout.table.prompts)))


def held_samples(config: EraseConfig, batch_size: int) -> int:
    """How many of a batch hold the student to the teacher."""
    share = config.held_share
    return max(int(share * batch_size), min(1, batch_size - 1)) if share else 0


def bank_shape(config: EraseConfig, erasing: int, held: int, preserved: int) -> tuple[int, int, int | None]:
    """Trajectories in the bank that erase and that preserve, and steps kept of each (none: all).

    For batches of `erasing` + `held` samples and that many `preserved` prompts. A bank that is refilled holds no more than
    is used up until then.
    """
    steps, trajectories = config.steps_per_bank, config.bank_trajectories
    preserving = (config.preserve_trajectories or preserved) if held else 0
    if steps is None:
        return trajectories, preserving, None
    trajectories = min(trajectories, erasing * steps)
    return trajectories, min(preserving, math.ceil(held * steps / 2)), math.ceil(erasing * steps / trajectories)


def ask(tuples: Bank, table: PairTable, erasing: int, neutral: list[bool]) -> Batch:
    """The batch in which the first `erasing` tuples erase and each other one holds the student to the teacher.

    A held sample is asked with its pair's neutral prompt (where `neutral` says so), its target being e_null (η = 0), or
    with its prompt, the target being e_concept (η = −1). Without any the prediction without the concept moves along with
    the one that names it, and classifier-free guidance, which amplifies their difference, undoes part of the erasure.
    """
    rows, etas, weights = table.asked[tuples.pairs], table.etas[tuples.pairs], table.weights[tuples.pairs]
    anchor = None if table.anchors is None else tuples.teacher[2]
    if neutral:
        asks_neutral = send(torch.tensor(neutral), tuples.pairs.device)
        rows[erasing:] = torch.where(asks_neutral, table.neutrals[tuples.pairs][erasing:], rows[erasing:])
        etas[erasing:] = asks_neutral.float() - 1.0
        weights[erasing:] = 1.0
        if anchor is not None:
            anchor = torch.cat([anchor[:erasing], tuples.teacher[0, erasing:]])
    embeds = pick(table.embeds, rows)
    pair = tuples.teacher[:2].flatten(0, 1)
    return Batch(tuples.inputs, tuples.timesteps, embeds, pair, etas, weights, anchor, erasing)


def _advance(turns: Iterator[object], count: int) -> None:
    """Take so many, for nothing."""
    next(itertools.islice(turns, count, count), None)


def _shuffled(items: Tensor, generator: torch.Generator) -> Iterator[int]:
    """`items` in random order, then again in another, without end."""
    while True:
        yield from items[torch.randperm(len(items), generator=generator)].tolist()


def _held(erases: Tensor, sides: Iterator[bool], generator: torch.Generator) -> Iterator[tuple[int, bool]]:
    """Tuples to hold and whether to ask for the neutral prompt: as `sides` says, where there are preserved ones."""
    without = _shuffled(erases.nonzero().squeeze(1), generator)
    if erases.all():
        yield from ((i, True) for i in without)
    preserved = _shuffled((~erases).nonzero().squeeze(1), generator)
    for neutral in sides:
        yield next(without if neutral else preserved), neutral
