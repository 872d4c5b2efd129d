"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, ε- or v-prediction."""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from torch import Tensor

from esd_peft.models.checkpoint_layout import CheckpointLayout
from esd_peft.models.family import TOKENS, ModelFamily, PromptEmbeds
from esd_peft.runtime.devices import send

EMBEDDED_GUIDANCE = 7.5  # the pipeline's default, for a guidance-distilled UNet
CONSISTENCY_SCHEDULERS = ("LCMScheduler", "TCDScheduler")  # they jump to the image and back: with distilled models only


class StableDiffusion(ModelFamily):
    """Scopes are those of the paper (`scopes.cross_attention`).

    The buffer, the target and the loss are the same for ε- and v-prediction: the guided target is linear in the
    predictions (see `esd_peft.training.target`), and the pipeline's scheduler knows which of the two it steps with.

    Latent consistency models are distilled: trajectories have 4 steps and no classifier-free guidance. A UNet with a
    guidance embedding (`time_cond_proj_dim`) always gets the pipeline's default scale, as FLUX.1 dev does.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    denoiser_part: ClassVar[str] = "unet"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds"}
    lora_markers: ClassVar[tuple[str, ...]] = ("attn2.to_k", "attn2.to_v")

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.few_step:
            self.guidance_scale, self.num_inference_steps = 1.0, 4

    @property
    def few_step(self) -> bool:
        """True if the denoiser was distilled to draw in a few steps without guidance."""
        return self._has_guidance_embedding or type(self.noise_schedule.scheduler).__name__ in CONSISTENCY_SCHEDULERS

    @property
    def _has_guidance_embedding(self) -> bool:
        return self.load_config(self.denoiser_part).get("time_cond_proj_dim") is not None

    @property
    def checkpoint_layout(self) -> CheckpointLayout:
        encoders = {"text_encoder": "cond_stage_model."}
        if self.load_config("text_encoder").get("hidden_act") != "gelu":  # CLIP's own, not OpenCLIP's
            return CheckpointLayout("stable-diffusion-v1", "sd_v1", encoders)
        if self.noise_schedule.predicts_noise:
            return CheckpointLayout("stable-diffusion-v2-512", "sd_v2", encoders)
        return CheckpointLayout("stable-diffusion-v2-768-v", "sd_v2_v", encoders)

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        guidance = {"guidance_scale": EMBEDDED_GUIDANCE} if self._has_guidance_embedding else {}
        return super().pipeline_arguments(embeds, null) | guidance

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`{"encoder_hidden_states": [prompts, tokens, width]}`."""
        return {TOKENS: pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)[0]}

    def cross_attention(self, denoiser: ModelMixin) -> list[str]:
        return [name.removesuffix(".attn2") for name, _ in denoiser.named_modules() if name.endswith(".attn2")]

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        return denoiser(latents, timesteps, timestep_cond=embedded_guidance(denoiser, latents), **embeds).sample


def embedded_guidance(denoiser: ModelMixin, latents: Tensor) -> Tensor | None:
    """The embedding `[B, time_cond_proj_dim]` of the guidance scale, for a denoiser that is told one."""
    width = denoiser.config.time_cond_proj_dim
    if width is None:
        return None
    scale = torch.full((len(latents),), EMBEDDED_GUIDANCE - 1)
    embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale, embedding_dim=width)
    return send(embedding.to(latents.dtype), latents.device)
