"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, ε- or v-prediction."""

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from torch import Tensor

from esd_peft.backbones.backbone import TOKENS, Backbone, PromptEmbeds


class StableDiffusion(Backbone):
    """Scopes are those of the paper (`scopes.cross_attention`).

    The bank, the target and the loss are the same for ε- and v-prediction: the guided target is linear in the
    predictions (see `esd_peft.objectives`), and the pipeline's scheduler knows which of the two it steps with.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    denoiser_part: ClassVar[str] = "unet"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds"}

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`{"encoder_hidden_states": [prompts, tokens, width]}`."""
        return {TOKENS: pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)[0]}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        return denoiser(latents, timesteps, **embeds).sample
