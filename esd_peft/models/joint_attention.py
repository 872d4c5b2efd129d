"""Common parts of families whose attention layers process text and image together: flow matching and scopes."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from esd_peft.models import scopes
from esd_peft.models.family import TOKENS, ModelFamily

POOLED = "pooled_projections"


class JointAttention(ModelFamily):
    """Scopes: `scopes.joint_attention`."""

    denoiser_part: ClassVar[str] = "transformer"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", POOLED: "pooled_prompt_embeds"}

    def in_scope(self, scope: str, name: str) -> bool:
        return scopes.joint_attention(scope, name)

    def prompt_input(self, name: str) -> str | None:
        if name.split(".")[0] in scopes.ENTRANCES:
            return TOKENS
        return POOLED if "text_embedder.linear_1" in name else None


class PackedLatents(JointAttention):
    """Latents are packed, `[B, tokens, channels]`, a token for 2 x 2 of them; images are 1024² (the pipelines' default)."""

    default_latent_size: tuple[int, int] | None = (128, 128)

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        height, width = self.latent_size(denoiser)
        channels = denoiser.config.in_channels // 4
        return self.pack_latents(torch.randn(count, channels, height, width, generator=generator))

    def unpack_latents(self, latents: Tensor) -> Tensor:
        side = 2 * math.isqrt(latents.shape[1]) * self.vae_factor
        return self.pipeline_class._unpack_latents(latents, side, side, self.vae_factor)

    def pack_latents(self, latents: Tensor) -> Tensor:
        return self.pipeline_class._pack_latents(latents, *latents.shape)

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        """Evenly spaced sigmas, shifted by the number of latent tokens."""
        return evenly_shifted(scheduler, latents.shape[1], num_inference_steps)


def from_zero_to_one(timesteps: Tensor, latents: Tensor) -> Tensor:
    """Timesteps as the pipelines of packed latents tell their denoiser: rounded as `latents` are, and then once more.

    In bfloat16 that is up to four timesteps from where rounding once would lead, and these denoisers tell them apart.
    """
    return timesteps.to(latents.dtype) / 1000


def shift_of(config: dict[str, Any], max_shift: float) -> tuple[float, ...]:
    """Return the arguments of diffusers' `calculate_shift` from a scheduler's config, with the pipelines' defaults."""
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return tuple(config.get(name, default) for name, default in defaults.items())


def evenly_shifted(scheduler: SchedulerMixin, tokens: int, num_inference_steps: int) -> dict[str, Any]:
    """Return the scheduler arguments of the pipelines: evenly spaced sigmas, and a shift by the number of latent tokens."""
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    shift = calculate_shift(tokens, *shift_of(scheduler.config, max_shift=1.15))
    return {"sigmas": sigmas, "mu": shift}
