"""Denoising trajectories, and the bank of guided pairs that they leave behind.

A classifier-free-guidance step at (x_t, t) computes e_null and e_concept anyway, and these are all that the
guided target needs. So a trajectory of N steps, 2N forwards, is N training tuples.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor
from tqdm import tqdm

from esd_peft.backbones import Backbone, PromptEmbeds
from esd_peft.backbones.backbone import pick
from esd_peft.config import EraseConfig
from esd_peft.phases import Costs


@dataclass
class Bank:
    """Training tuples, in host memory. `T` tuples; half precision where the denoiser computes in it."""

    inputs: Tensor  # [T, ...] x_t as the denoiser is fed it, already through scale_model_input
    timesteps: Tensor  # [T]
    teacher: Tensor  # [2, T, ...] e_null, e_concept
    prompts: Tensor  # [T] int64, which of the prompt embeddings is the concept

    def __len__(self) -> int:
        return len(self.timesteps)

    def take(self, index: Tensor, device: torch.device) -> "Bank":
        """The tuples `index` `[B]`, on `device`."""
        return Bank(
            self.inputs[index].to(device, non_blocking=True),
            self.timesteps[index].to(device, non_blocking=True),
            self.teacher[:, index].to(device, non_blocking=True),
            self.prompts[index].to(device, non_blocking=True),
        )


def join(banks: list[Bank]) -> Bank:
    """Banks one after the other."""
    return Bank(
        torch.cat([b.inputs for b in banks]),
        torch.cat([b.timesteps for b in banks]),
        torch.cat([b.teacher for b in banks], dim=1),
        torch.cat([b.prompts for b in banks]),
    )


@dataclass
class Rollout:
    """Runs trajectories as `config` says, on the denoiser as it is.

    `teacher` is a context in which the denoiser is the frozen teacher. With `config.rollout == "teacher"` it drives
    the trajectories too (the authors' current code); with "student" the denoiser as it is drives them and the teacher
    only answers at the x_t that are kept (the paper).

    A share `config.anticipate` of the teacher's trajectories goes where the finished student will go: they are driven
    by the guided target, `e_null − guidance_scale · η · (e_concept − e_null)`, which the teacher knows beforehand. The
    others are driven by the teacher's own guided prediction, and show the concept.
    """

    backbone: Backbone
    denoiser: ModelMixin
    embeds: PromptEmbeds  # row 0 is the null prompt
    teacher: Callable[[], AbstractContextManager[None]]
    config: EraseConfig
    device: torch.device
    dtype: torch.dtype
    costs: Costs

    def fill(self, prompts: Tensor, generator: torch.Generator, keep: int | None = None, progress: bool = True) -> Bank:
        """One trajectory for each of `prompts` `[M]` (rows of `embeds`).

        Keeps every step of each, or `keep` steps chosen at random; a trajectory stops after its last kept step.
        """
        config, count, size = self.config, len(prompts), self.config.rollout_batch_size
        noise = self.backbone.initial_latents(count, self.denoiser, generator)
        scales = torch.full((count,), config.guidance_scale)
        if config.rollout == "teacher":
            scales[: round(config.anticipate * count)] *= -config.eta
        parts = zip(noise.split(size), scales.split(size), prompts.split(size), strict=True)
        with tqdm(total=-(-count // size) * config.num_inference_steps, desc="rollout", disable=not progress) as bar:
            return join([self._trajectories(n, s, p, generator, keep, bar) for n, s, p in parts])

    @torch.no_grad()
    def _trajectories(
        self, noise: Tensor, scales: Tensor, prompts: Tensor, generator: torch.Generator, keep: int | None, bar: tqdm
    ) -> Bank:
        scheduler = self.backbone.new_scheduler(self.config.num_inference_steps, self.device)
        steps = len(scheduler.timesteps)  # some schedulers take a step or two more than asked
        kept = _choose(len(prompts), steps, keep, generator)
        latents = noise.to(self.device) * scheduler.init_noise_sigma
        scales = scales.to(self.device).view(-1, *[1] * (latents.dim() - 1))
        rows = prompts.to(self.device)
        banks = []
        for i, timestep in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(latents, timestep)
            pair = None
            if self.config.rollout == "teacher":
                with self.teacher():
                    pair = self._pair(inputs, timestep, rows)
            if kept[:, i].any():
                here = kept[:, i].nonzero().squeeze(1).to(self.device)
                answer = pair[:, here] if pair is not None else self._ask_teacher(inputs[here], timestep, rows[here])
                banks.append(self._tuples(inputs[here], timestep, answer, rows[here]))
            bar.update()
            if not kept[:, i + 1 :].any():
                break
            if pair is None:
                pair = self._pair(inputs, timestep, rows)
            null, concept = pair.float()
            guided = null + scales * (concept - null)
            latents = self.backbone.scheduler_step(scheduler, guided, timestep, latents, generator)
        return join(banks)

    def _ask_teacher(self, inputs: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        with self.teacher():
            return self._pair(inputs, timestep, rows)

    def _pair(self, inputs: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        """e_null and e_concept as one batch, the null half first: `[2, M, ...]`."""
        embeds = pick(self.embeds, torch.cat([torch.zeros_like(rows), rows]))
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            twice = torch.cat([inputs, inputs]).to(self.dtype)
            prediction = self.backbone.predict(self.denoiser, twice, timestep.expand(len(twice)), embeds)
        self.costs.forward_equivalents += len(twice)
        return prediction.unflatten(0, (2, len(rows)))

    def _tuples(self, inputs: Tensor, timestep: Tensor, pair: Tensor, rows: Tensor) -> Bank:
        kept = (inputs.to(self.dtype), timestep.expand(len(rows)), pair.to(self.dtype), rows)
        return Bank(*(x.contiguous().cpu() for x in kept))


def _choose(trajectories: int, steps: int, keep: int | None, generator: torch.Generator) -> Tensor:
    """Which steps of each trajectory become tuples: `[M, steps]` bool."""
    if keep is None or keep >= steps:
        return torch.ones(trajectories, steps, dtype=torch.bool)
    order = torch.rand(trajectories, steps, generator=generator).argsort(dim=1)
    return order < keep
