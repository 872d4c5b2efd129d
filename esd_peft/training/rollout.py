"""Denoising trajectories, and the bank of guided pairs that they leave behind.

A classifier-free-guidance step at (x_t, t) computes e_null and e_concept anyway, and these are all that the
guided target needs. So a trajectory of N steps, 2N forwards, is N training tuples.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.models import Backbone, PromptEmbeds
from esd_peft.models.family import pick
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime import distributed, interrupts
from esd_peft.runtime.devices import autocast, fetch, finish, send
from esd_peft.runtime.profiling import Costs


@dataclass
class PairTable:
    """The pairs of a plan as rows of prompt embeddings. `P` pairs; the first `erasing` of them erase, the rest preserve."""

    embeds: PromptEmbeds
    prompts: Tensor  # [P] int64, the row that names the concept
    asked: Tensor  # [P] int64, the row that the student is asked in its place: mostly the same
    neutrals: Tensor  # [P] int64
    anchors: Tensor | None  # [P] int64, where some pair has an anchor; pairs without one name their neutral row
    etas: Tensor  # [P] fp32
    weights: Tensor  # [P] fp32
    concepts: list[list[int]]  # for each concept its pairs, the plain wording first
    erasing: int


def make_table(plan: PromptPlan, embeds: PromptEmbeds) -> PairTable:
    """The plan's pairs; `embeds` are those of `plan.texts`."""
    pairs, row = plan.pairs, {text: i for i, text in enumerate(plan.texts)}
    device = next(iter(embeds.values())).device
    numbers = iter(range(len(pairs)))
    concepts = [[*itertools.islice(numbers, len(erasing))] for erasing in plan.erasing]
    anchors = [row[p.goal] for p in pairs]
    return PairTable(
        {name: value[: len(plan.paired_texts)].clone() for name, value in embeds.items()},
        torch.tensor([row[p.prompt] for p in pairs], device=device),
        torch.tensor([row[p.asked] for p in pairs], device=device),
        torch.tensor([row[p.neutral] for p in pairs], device=device),
        torch.tensor(anchors, device=device) if any(p.anchor is not None for p in pairs) else None,
        torch.tensor([p.eta for p in pairs], device=device),
        torch.tensor([p.weight for p in pairs], device=device),
        concepts,
        sum(map(len, concepts)),
    )


@dataclass
class Bank:
    """Training tuples, in host memory. `T` tuples; half precision where the denoiser computes in it.

    A batch is gathered on the CPU and sent through pinned memory while the GPU is still busy with the step before. So the
    bank takes no GPU memory (100 KiB a tuple for Stable Diffusion 1.x, 1.5 MiB for FLUX at 1024²), and what is left for the
    GPU to do, to copy a batch of that, is too little to prefetch it on a stream of its own.
    """

    inputs: Tensor  # [T, ...] x_t as the denoiser is fed it, already through scale_model_input
    timesteps: Tensor  # [T]
    teacher: Tensor  # [2 or 3, T, ...] e_null, e_concept and, where a pair has one, e_anchor
    pairs: Tensor  # [T] int64, which pair of the table

    def __len__(self) -> int:
        return len(self.timesteps)

    def take(self, index: Tensor, device: torch.device) -> "Bank":
        """The tuples `index` `[B]`, on `device`."""
        return Bank(
            send(self.inputs[index], device),
            send(self.timesteps[index], device),
            send(self.teacher[:, index], device),
            send(self.pairs[index], device),
        )


def join(banks: list[Bank]) -> Bank:
    """Banks one after the other."""
    return Bank(
        torch.cat([b.inputs for b in banks]),
        torch.cat([b.timesteps for b in banks]),
        torch.cat([b.teacher for b in banks], dim=1),
        torch.cat([b.pairs for b in banks]),
    )


@dataclass
class Rollout:
    """Runs trajectories as `config` says, on the denoiser as it is.

    `teacher` is a context in which the denoiser is the frozen teacher. With `config.rollout == "teacher"` it drives
    the trajectories too (the authors' current code); with "student" the denoiser as it is drives them and the teacher
    only answers at the x_t that are kept (the paper).

    A share `config.anticipate` of the teacher's trajectories goes where the finished student will go: they are driven
    by the guided target, which the teacher knows beforehand. The others are driven by the teacher's own guided
    prediction, and show the concept.

    Raises `UserError` if no step lies within the config's timesteps.
    """

    backbone: Backbone
    denoiser: ModelMixin
    table: PairTable
    teacher: Callable[[], AbstractContextManager[None]]
    config: EraseConfig
    device: torch.device
    dtype: torch.dtype
    costs: Costs

    def __post_init__(self) -> None:
        noise = self.backbone.initial_latents(1, self.denoiser, torch.Generator())
        self._inside(self.backbone.begin(noise, self.num_inference_steps)[0])

    @property
    def num_inference_steps(self) -> int:
        """The config's, or else what the family takes."""
        return self.config.num_inference_steps or self.backbone.num_inference_steps

    @property
    def guidance_scale(self) -> float:
        """The config's, or else what the family takes."""
        given = self.config.guidance_scale
        return self.backbone.guidance_scale if given is None else given

    def autocast(self) -> AbstractContextManager[None]:
        """For each run of the denoiser."""
        return autocast(self.config, self.device, self.dtype)

    def fill(self, pairs: Tensor, generator: torch.Generator, keep: int | None = None, progress: bool = True) -> Bank:
        """One trajectory for each of `pairs` `[M]` (of `table`).

        Keeps every step of each within the config's timesteps, or `keep` of these chosen at random; trajectories
        stop after the last kept step.
        """
        config, count, size = self.config, len(pairs), self.config.rollout_batch_size
        noise = self.backbone.initial_latents(count, self.denoiser, generator)
        anticipating = torch.zeros(count, dtype=torch.bool)
        if config.rollout == "teacher":
            erasing = (pairs < self.table.erasing).nonzero().squeeze(1)
            some = torch.randperm(len(erasing), generator=generator)[: round(config.anticipate * len(erasing))]
            anticipating[erasing[some]] = True
        parts = zip(noise.split(size), anticipating.split(size), pairs.split(size), strict=True)
        shown = progress and distributed.first()
        with tqdm(total=-(-count // size) * self.num_inference_steps, desc="rollout", disable=not shown) as bar:
            return join([self._trajectories(n, a, p, generator, keep, bar) for n, a, p in parts])

    @torch.no_grad()
    def _trajectories(
        self,
        noise: Tensor,
        anticipating: Tensor,
        pairs: Tensor,
        generator: torch.Generator,
        keep: int | None,
        bar: "tqdm[Any]",
    ) -> Bank:
        # the scheduler is on the CPU, where it looks up its tables: the host would have to wait for a timestep on a GPU
        scheduler, latents = self.backbone.begin(noise, self.num_inference_steps)
        kept = _choose(len(pairs), self._inside(scheduler), keep, generator)
        latents, anticipating, pairs = (send(x, self.device) for x in (latents, anticipating, pairs))
        timesteps = send(scheduler.timesteps, self.device)
        banks = []
        for i, timestep in enumerate(scheduler.timesteps):
            interrupts.stop_here()
            inputs = self.backbone.scale_input(scheduler, latents, timestep)
            answer = None
            if self.config.rollout == "teacher":
                with self.teacher():
                    answer = self._predict(inputs, timesteps[i], pairs)
            if kept[:, i].any():
                here = send(kept[:, i].nonzero().squeeze(1), self.device)
                told = answer[:, here] if answer is not None else self._ask_teacher(inputs[here], timesteps[i], pairs[here])
                banks.append(self._tuples(inputs[here], timesteps[i], told, pairs[here]))
            bar.update()
            if not kept[:, i + 1 :].any():
                break
            if answer is None:
                answer = self._predict(inputs, timesteps[i], pairs, anchored=False)  # only a teacher anticipates
            guided = self._guided(answer.float(), anticipating, pairs)
            latents = self.backbone.scheduler_step(scheduler, guided, timestep, latents, generator)
        finish(self.device)  # what was fetched is there now
        return join(banks)

    def _inside(self, scheduler: SchedulerMixin) -> Tensor:
        """Which steps of a trajectory lie within the config's timesteps, `[steps]` bool."""
        places = self.backbone.noise_schedule.training_timesteps(scheduler.timesteps)
        inside = (places >= self.config.min_timestep) & (places <= self.config.max_timestep)
        if not inside.any():
            there = ", ".join(str(int(t)) for t in places)
            raise UserError(f"--min-timestep and --max-timestep leave no step of a trajectory, which has {there}")
        return inside

    def _guided(self, answer: Tensor, anticipating: Tensor, pairs: Tensor) -> Tensor:
        """The classifier-free-guided prediction that drives the next step."""
        null, concept = answer[:2]
        column = (-1, *[1] * (null.dim() - 1))
        eta = self.table.etas[pairs].view(column)
        target = (answer[2] if len(answer) == 3 else null) - eta * (concept - null)
        towards = torch.where(anticipating.view(column), target, concept)
        return null + self.guidance_scale * (towards - null)

    def _ask_teacher(self, inputs: Tensor, timestep: Tensor, pairs: Tensor) -> Tensor:
        with self.teacher():
            return self._predict(inputs, timestep, pairs)

    def _predict(self, inputs: Tensor, timestep: Tensor, pairs: Tensor, anchored: bool = True) -> Tensor:
        """e_null, e_concept and, where a pair has one, e_anchor, as one batch: `[2 or 3, M, ...]`."""
        table, count = self.table, len(pairs)
        own = slice((part := distributed.share(count)).start, part.stop)  # of the trajectories; the others' come back below
        inputs, pairs = inputs[own], pairs[own]
        rows = [table.neutrals[pairs], table.prompts[pairs]]
        if table.anchors is not None and anchored:
            rows.append(table.anchors[pairs])
        repeated = inputs.to(self.dtype).repeat(len(rows), *[1] * (inputs.dim() - 1))
        with self.autocast():
            embeds = pick(table.embeds, torch.cat(rows))
            prediction = self._run(repeated, timestep, embeds)
        self.costs.forward_equivalents += len(rows) * count
        return distributed.gather(prediction.unflatten(0, (len(rows), len(pairs))), count, dim=1)

    def _run(self, inputs: Tensor, timestep: Tensor, embeds: PromptEmbeds) -> Tensor:
        if not len(inputs):  # more processes than trajectories
            return inputs
        return self.backbone.predict(self.denoiser, inputs, timestep.expand(len(inputs)), embeds)

    def _tuples(self, inputs: Tensor, timestep: Tensor, answer: Tensor, pairs: Tensor) -> Bank:
        kept = (inputs.to(self.dtype), timestep.expand(len(pairs)), answer.to(self.dtype), pairs)
        return Bank(*(fetch(x.contiguous()) for x in kept))


def _choose(trajectories: int, inside: Tensor, keep: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each trajectory become tuples, of those `inside` `[steps]`: `[M, steps]` bool."""
    if keep is None or keep >= int(inside.sum()):
        return inside.expand(trajectories, -1)
    draws = torch.rand(trajectories, len(inside), generator=generator).masked_fill(~inside, 2.0)
    return draws.argsort(dim=1).argsort(dim=1) < keep
