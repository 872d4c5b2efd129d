"""Denoising trajectories, and the samples that they leave behind.

A classifier-free-guidance step at (x_t, t) computes e_null and e_concept anyway, and these are all that the guided target
needs. So a trajectory of N steps, 2N denoiser evaluations, is N training samples.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from esd_peft.models.family import index_embeds
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.table import PairTable
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import fetch, finish, send
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.buffer import Buffer, concatenate
from esd_peft.training.student import Student

GUIDED = 0.5  # the share of mixed rollouts that the guided target drives


@dataclass
class Rollout:
    """Runs trajectories of `student`'s denoiser, as it is, or as the teacher that it is without its adapter."""

    student: Student
    profiler: PhaseProfiler
    shared: bool = True  # several processes predict a part each, and tell the others

    def collect(
        self,
        table: PairTable,
        pairs: Tensor,
        options: BufferOptions,
        generator: torch.Generator,
        keep: int | None = None,
        progress: bool = True,
    ) -> Buffer:
        """Collect the training samples of one trajectory for each of `pairs` `[M]` (of `table`).

        With `options.rollout == "teacher"` the frozen teacher's guided prediction drives them, and they show the concept
        (the authors' current code); with "student" the denoiser as it is drives them, and the teacher only predicts at the
        x_t that are kept (the paper). With "mixed" half of the teacher's go where the finished student will go: they are
        driven by the guided target, which the teacher knows beforehand.

        Keeps every step of each, or `keep` of these chosen at random; trajectories stop after the last kept step.
        """
        count, size, student = len(pairs), options.rollout_batch_size, self.student
        noise = student.family.initial_latents(count, student.denoiser, generator)
        guided = torch.zeros(count, dtype=torch.bool)
        if options.rollout != "student":  # "teacher" and "mixed" make the same draws
            erasing = (pairs < table.num_concept_pairs).nonzero().squeeze(1)
            order = torch.randperm(len(erasing), generator=generator)
            if options.rollout == "mixed":
                guided[erasing[order[: round(GUIDED * len(erasing))]]] = True
        parts = zip(noise.split(size), guided.split(size), pairs.split(size), strict=True)
        shown = progress and distributed.is_main_process()
        with tqdm(total=-(-count // size) * options.num_inference_steps, desc="rollout", disable=not shown) as bar:
            return concatenate([self._trajectories(table, n, g, p, options, generator, keep, bar) for n, g, p in parts])

    @torch.no_grad()
    def _trajectories(
        self,
        table: PairTable,
        noise: Tensor,
        guided: Tensor,
        pairs: Tensor,
        options: BufferOptions,
        generator: torch.Generator,
        keep: int | None,
        bar: "tqdm[Any]",
    ) -> Buffer:
        family, device = self.student.family, self.student.device
        by_teacher = options.rollout != "student"
        # the scheduler is on the CPU, where it looks up its tables: the host would have to wait for a timestep on a GPU
        scheduler, latents = family.set_timesteps(noise, options.num_inference_steps)
        kept = _choose(len(pairs), len(scheduler.timesteps), keep, generator)
        latents, guided, pairs = (send(x, device) for x in (latents, guided, pairs))
        timesteps = send(scheduler.timesteps, device)
        buffers = []
        for i, timestep in enumerate(scheduler.timesteps):
            distributed.stop_together()
            inputs = family.scale_input(scheduler, latents, timestep)
            predictions = self._predict(table, inputs, timesteps[i], pairs, teacher=True) if by_teacher else None
            if kept[:, i].any():
                here = send(kept[:, i].nonzero().squeeze(1), device)
                if predictions is None:
                    answers = self._predict(table, inputs[here], timesteps[i], pairs[here], teacher=True)
                else:
                    answers = predictions[:, here]
                buffers.append(self._samples(inputs[here], timesteps[i], answers, pairs[here]))
            bar.update()
            if not kept[:, i + 1 :].any():
                break
            if predictions is None:
                predictions = self._predict(table, inputs, timesteps[i], pairs, teacher=False)
            null, towards = _directions(table, predictions.float(), guided, pairs)
            driving = family.guide(null, towards, options.guidance_scale)
            latents = family.scheduler_step(scheduler, driving, timestep, latents, generator)
        finish(device)  # what was fetched is there now
        return concatenate(buffers)

    def _predict(self, table: PairTable, inputs: Tensor, timestep: Tensor, pairs: Tensor, teacher: bool) -> Tensor:
        """e_null, e_concept and, by the teacher where a pair has one, e_anchor, as one batch: `[2 or 3, M, ...]`."""
        count = len(pairs)
        # of the trajectories; the others' come back below
        own = slice((part := distributed.share(count)).start, part.stop) if self.shared else slice(None)
        inputs, pairs = inputs[own], pairs[own]
        rows = [table.neutrals[pairs], table.prompts[pairs]]
        if table.anchors is not None and teacher:  # nothing but the teacher's guided target drives by the anchor
            rows.append(table.anchors[pairs])
        repeated = inputs.to(self.student.dtype).repeat(len(rows), *[1] * (inputs.dim() - 1))
        prediction = repeated  # where there are more processes than trajectories
        if len(repeated):
            who: AbstractContextManager[None] = self.student.teacher() if teacher else nullcontext()
            with who:
                embeds = index_embeds(table.embeds, torch.cat(rows))
                prediction = self.student.predict(repeated, timestep.expand(len(repeated)), embeds)
        self.profiler.nfe += len(rows) * count
        call = "evaluation" if teacher else "student evaluation"
        self.profiler.count("trajectories", {call: len(rows) * count})
        prediction = prediction.unflatten(0, (len(rows), len(pairs)))
        return distributed.gather(prediction, count, dim=1) if self.shared else prediction

    def _samples(self, inputs: Tensor, timestep: Tensor, answers: Tensor, pairs: Tensor) -> Buffer:
        dtype = self.student.dtype
        kept = (inputs.to(dtype), timestep.expand(len(pairs)), answers.to(dtype), pairs)
        return Buffer(*(fetch(x.contiguous()) for x in kept))


def _directions(table: PairTable, predictions: Tensor, guided: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prediction of the next step: e_null, the first of the two, and e_concept, or where `guided` the target."""
    null, concept = predictions[:2]
    column = (-1, *[1] * (null.dim() - 1))
    eta = table.etas[pairs].view(column)
    target = (predictions[2] if len(predictions) == 3 else null) - eta * (concept - null)
    return null, torch.where(guided.view(column), target, concept)


def _choose(trajectories: int, steps: int, keep: int | None, generator: torch.Generator) -> Tensor:
    """Choose the steps of each trajectory that become samples: `[M, steps]` bool."""
    if keep is None or keep >= steps:
        return torch.ones(trajectories, steps, dtype=torch.bool)
    draws = torch.rand(trajectories, steps, generator=generator)
    return draws.argsort(dim=1).argsort(dim=1) < keep
