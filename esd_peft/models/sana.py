"""Sana: Gemma's tokens with a mask, a linear-attention DiT with cross-attention, flow matching."""

import inspect
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SanaPipeline
from torch import Tensor

from esd_peft.models.family import MASK, TOKENS, ModelFamily, PromptEmbeds


class Sana(ModelFamily):
    """Scopes are those of the paper (`scopes.cross_attention`).

    Prompts are preceded by the pipeline's instruction to Gemma, as in its own call; the null prompt is not.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = SanaPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    denoiser_part: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 1
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", MASK: "prompt_attention_mask"}

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 300, 2304]` and their mask `[prompts, 300]`."""
        instruction = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        arguments = {"complex_human_instruction": instruction, "max_sequence_length": self.prompt_length}
        tokens, mask, null, null_mask = pipe.encode_prompt(prompts, device=device, **arguments)
        is_null = torch.tensor([not prompt for prompt in prompts], device=tokens.device)[:, None]
        return {
            TOKENS: torch.where(is_null[:, :, None], null, tokens),
            MASK: torch.where(is_null, null_mask, mask),
        }

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        return denoiser(latents, timestep=timesteps * denoiser.config.timestep_scale, **embeds).sample

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        return denoiser.caption_norm(denoiser.caption_projection(embeds[TOKENS]))
