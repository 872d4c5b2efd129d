"""What families have in common in which text and image are in the same attention layers: flow matching, and the scopes."""

from typing import Any, ClassVar

import numpy as np
from diffusers import SchedulerMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

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


def shift_of(config: dict[str, Any], max_shift: float) -> tuple[float, ...]:
    """What diffusers' `calculate_shift` takes from a scheduler's config, with the pipelines' defaults."""
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return tuple(config.get(name, default) for name, default in defaults.items())


def evenly_shifted(scheduler: SchedulerMixin, tokens: int, num_inference_steps: int) -> dict[str, Any]:
    """What the pipelines tell their scheduler: evenly spaced sigmas, and a shift by the number of latent tokens."""
    sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    shift = calculate_shift(tokens, *shift_of(scheduler.config, max_shift=1.15))
    return {"sigmas": sigmas, "mu": shift}
