"""FLUX.2 dev and klein: a language model's hidden states, an MMDiT on normalized, packed latents, flow matching."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor

from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import JointAttention, from_zero_to_one
from esd_peft.runtime.devices import send

EMBEDDED_GUIDANCE = 4.0  # the pipeline's default


class Flux2(JointAttention):
    """FLUX.2 dev. Scopes: `scopes.joint_attention`; in single layers attention and feed-forward are one, in `selfattn`.

    As FLUX.1 dev it is guidance-distilled: it is told a guidance scale (4 here, always), trajectories run without
    classifier-free guidance, and its pipeline knows no negative prompt.

    Latents are normalized by running statistics of the VAE and packed, `[B, tokens, channels]`, a token for 2 x 2 of them.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2Pipeline
    lora_skips: ClassVar[tuple[str, ...]] = (
        "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation",
    )  # fmt: skip
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds"}
    default_latent_size: tuple[int, int] | None = (128, 128)
    guidance_scale: float = 1.0
    takes_guidance: bool = False

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 512, 3 * width]`, of three of the text encoder's layers."""
        return {TOKENS: pipe.encode_prompt(prompts, device=device, max_sequence_length=self.prompt_length)[0]}

    def templated(self, tokenizer: Any, text: str) -> str:
        text_with_template: str = tokenizer.apply_chat_template(format_input([text])[0], tokenize=False)
        return text_with_template

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        height, width = self.latent_size(denoiser)
        noise = torch.randn(count, denoiser.config.in_channels, height // 2, width // 2, generator=generator)
        return self.pipeline_class._pack_latents(noise)

    def vae_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        side = math.isqrt(latents.shape[1])
        mean, std = _statistics(vae)
        return self.pipeline_class._unpatchify_latents(latents.mT.unflatten(2, (side, side)) * std + mean)

    def denoiser_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae)
        return self.pipeline_class._pack_latents((self.pipeline_class._patchify_latents(latents) - mean) / std)

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        """Evenly spaced sigmas, shifted by the numbers of latent tokens and of steps."""
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        shift = compute_empirical_mu(latents.shape[1], num_inference_steps)
        return {"sigmas": None if scheduler.config.get("use_flow_sigmas") else sigmas, "mu": shift}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        batch, side = len(latents), math.isqrt(latents.shape[1])
        guidance = (
            torch.full((batch,), EMBEDDED_GUIDANCE, device=latents.device) if denoiser.config.guidance_embeds else None
        )
        words = self.pipeline_class._prepare_text_ids(torch.empty(1, *embeds[TOKENS].shape[1:], device="meta"))
        places = self.pipeline_class._prepare_latent_ids(torch.empty(1, 1, side, side, device="meta"))
        return denoiser(
            latents,
            timestep=from_zero_to_one(timesteps, latents),
            guidance=guidance,
            txt_ids=send(words, latents.device),
            img_ids=send(places, latents.device),
            **embeds,
        ).sample

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        return super().pipeline_arguments(embeds, null) | {"guidance_scale": EMBEDDED_GUIDANCE}


class Flux2Klein(Flux2):
    """FLUX.2 klein has no guidance embedding. The base models take classifier-free guidance; the others, as their
    `model_index.json` says, are distilled, and have 4 steps without it."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = Flux2KleinPipeline
    guidance_scale: float = 4.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.takes_guidance = not self.index.get("is_distilled")
        if not self.takes_guidance:
            self.guidance_scale, self.num_inference_steps = 1.0, 4

    def templated(self, tokenizer: Any, text: str) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text_with_template: str = tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)
        return text_with_template

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        return super().pipeline_arguments(embeds, null) | self.pipeline_guidance(self.guidance_scale)


def _statistics(vae: ModelMixin) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of patched latents, `[1, channels, 1, 1]`."""
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
