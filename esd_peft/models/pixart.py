"""PixArt-Σ: T5's tokens with a mask, a DiT with cross-attention, ε-prediction with a learned variance."""

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, PixArtSigmaPipeline
from torch import Tensor

from esd_peft.models.family import MASK, TOKENS, ModelFamily, PromptEmbeds


class PixArtSigma(ModelFamily):
    """Scopes are those of the paper (`scopes.cross_attention`). Keys and values read the tokens through
    `caption_projection`, which is in none but `esd-u` and `full`.

    diffusers has no LoRA loader for this pipeline: the adapter loads with `PeftModel.from_pretrained(transformer, ...)`.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = PixArtSigmaPipeline
    denoiser_is_a_file: ClassVar[bool] = True
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    denoiser_part: ClassVar[str] = "transformer"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", MASK: "prompt_attention_mask"}

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 300, 4096]` and their mask `[prompts, 300]`."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.prompt_length}
        tokens, mask, *_ = pipe.encode_prompt(prompts, device=device, **options)
        return {TOKENS: tokens, MASK: mask}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        sizes = {"resolution": None, "aspect_ratio": None}
        predicted = denoiser(latents, timestep=timesteps, added_cond_kwargs=sizes, **embeds).sample
        learns_variance = denoiser.config.out_channels // 2 == latents.shape[1]
        return predicted.chunk(2, dim=1)[0] if learns_variance else predicted

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        return denoiser.caption_projection(embeds[TOKENS])
