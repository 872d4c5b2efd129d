"""FLUX.1 dev and schnell: CLIP's pooled embedding and T5's tokens, an MMDiT on packed latents, flow matching."""

import math
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import POOLED, PackedLatents, from_zero_to_one
from esd_peft.runtime.devices import send

EMBEDDED_GUIDANCE = 3.5  # the pipeline's default, at which most images of FLUX.1 dev are made


class Flux(PackedLatents):
    """Scopes: `scopes.joint_attention`.

    FLUX.1 dev is guidance-distilled: it is conditioned on a guidance scale (always 3.5 here) and predicts the guided result.
    So trajectories run without classifier-free guidance (`guidance_scale` 1), as users' images do, and e_null and e_concept
    are such predictions for "" and for the concept. Their difference is still the direction of the concept, and the target
    has the scale at which the model is used. With --guidance-scale above 1 trajectories are driven by true classifier-free
    guidance on top of it, as the pipeline's `true_cfg_scale` does.

    schnell has no guidance embedding. It is a few-step model: trajectories have the 4 steps it was made for.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    denoiser_is_a_file: ClassVar[bool] = True
    lora_markers: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    guidance_scale: float = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if not self.load_config(self.denoiser_part).get("guidance_embeds"):
            self.num_inference_steps = 4

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 512, 4096]` and `pooled_projections` `[prompts, 768]`."""
        tokens, pooled, _ = pipe.encode_prompt(prompts, None, device=device, max_sequence_length=self.prompt_length)
        return {TOKENS: tokens, POOLED: pooled}

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        settings = super().schedule(scheduler, latents, num_inference_steps)
        return settings | {"sigmas": None} if scheduler.config.get("use_flow_sigmas") else settings

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        batch, tokens = latents.shape[:2]
        side = math.isqrt(tokens)
        guidance = (
            torch.full((batch,), EMBEDDED_GUIDANCE, device=latents.device) if denoiser.config.guidance_embeds else None
        )
        places = self.pipeline_class._prepare_latent_image_ids(batch, side, side, torch.device("cpu"), latents.dtype)
        return denoiser(
            latents,
            timestep=from_zero_to_one(timesteps, latents),
            guidance=guidance,
            txt_ids=torch.zeros(embeds[TOKENS].shape[1], 3, device=latents.device, dtype=latents.dtype),
            img_ids=send(places, latents.device),
            **embeds,
        ).sample

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        return super().pipeline_arguments(embeds, null) | {"guidance_scale": EMBEDDED_GUIDANCE}
