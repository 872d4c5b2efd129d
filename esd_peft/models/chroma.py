"""Chroma: T5's tokens with a mask, FLUX.1's MMDiT without pooled embedding and distilled guidance, flow matching."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from diffusers import ChromaPipeline, DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from esd_peft.models.family import MASK, TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import PackedLatents, from_zero_to_one
from esd_peft.runtime.devices import send


class Chroma(PackedLatents):
    """Scopes: `scopes.joint_attention`; the prompt comes in through `context_embedder` alone.

    The mask, of a prompt's tokens and one of padding, is a number that diffusers adds to attention's logits; so it is here.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ChromaPipeline
    lora_skips: ClassVar[tuple[str, ...]] = ("distilled_guidance_layer",)
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", MASK: "prompt_attention_mask"}
    guidance_scale: float = 5.0

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 512, 4096]` and their mask `[prompts, 512]`, as floats."""
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.prompt_length}
        tokens, _, mask, *_ = pipe.encode_prompt(prompts, device=device, **options)
        return {TOKENS: tokens, MASK: mask}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        batch, tokens = latents.shape[:2]
        side = math.isqrt(tokens)
        mask = torch.cat([embeds[MASK].to(latents.dtype), latents.new_ones(batch, tokens)], dim=1)
        places = self.pipeline_class._prepare_latent_image_ids(batch, side, side, torch.device("cpu"), latents.dtype)
        with _masked_when_recomputed(denoiser, mask):
            predicted: Tensor = denoiser(
                latents,
                timestep=from_zero_to_one(timesteps, latents),
                encoder_hidden_states=embeds[TOKENS],
                attention_mask=mask,
                txt_ids=torch.zeros(embeds[TOKENS].shape[1], 3, device=latents.device, dtype=latents.dtype),
                img_ids=send(places, latents.device),
            ).sample
        return predicted


@contextlib.contextmanager
def _masked_when_recomputed(denoiser: ModelMixin, mask: Tensor) -> Iterator[None]:
    """Give single layers the mask when they are recomputed: with gradient checkpointing diffusers (0.42) leaves it out."""
    if not denoiser.is_gradient_checkpointing:
        yield
        return
    checkpoint = denoiser._gradient_checkpointing_func

    def run(layer: nn.Module, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return checkpoint(functools.partial(layer, attention_mask=mask) if len(inputs) == 3 else layer, *inputs)

    denoiser._gradient_checkpointing_func = run
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = checkpoint
