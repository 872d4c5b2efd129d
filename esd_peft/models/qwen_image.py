"""Qwen-Image: Qwen2.5-VL's tokens, an MMDiT on packed latents of a video VAE, flow matching."""

import functools
import math
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, QwenImagePipeline
from torch import Tensor

from esd_peft.models.family import MASK, TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import PackedLatents, from_zero_to_one
from esd_peft.models.masked_tokens import encode_tokens, shortened
from esd_peft.models.video_latents import VideoLatents


class QwenImage(VideoLatents, PackedLatents):
    """Scopes: `scopes.joint_attention`; the prompt comes in through `txt_in`.

    The pipeline's classifier-free guidance keeps the norm that each token of the prediction for the prompt has, and so do
    trajectories here. Its argument is `true_cfg_scale`: the denoiser is told no guidance.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    denoiser_is_a_file: ClassVar[bool] = True
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", MASK: "prompt_embeds_mask"}
    guidance_scale: float = 4.0

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 512, 3584]` and their mask `[prompts, 512]`."""
        texts = [pipe.prompt_template_encode.format(prompt) for prompt in prompts]
        template = pipe.prompt_template_encode_start_idx
        return encode_tokens(pipe, texts, device, layer=-1, padding="longest", length=self.prompt_length, template=template)

    def templated(self, tokenizer: Any, text: str) -> str:
        """The template's beginning is left out, and does not count."""
        return text + self._template_end

    @functools.cached_property
    def _template_end(self) -> str:
        end: str = self.assemble((), torch.float32).prompt_template_encode.partition("{}")[2]
        return end

    def pack_latents(self, latents: Tensor) -> Tensor:
        return super().pack_latents(latents.flatten(1, -3))  # of one frame

    def guide(self, null: Tensor, towards: Tensor, scale: float) -> Tensor:
        guided = super().guide(null, towards, scale)
        return guided * (towards.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        side = math.isqrt(latents.shape[1])
        embeds = shortened(embeds)
        return denoiser(
            latents,
            timestep=from_zero_to_one(timesteps, latents),
            encoder_hidden_states=embeds[TOKENS],
            encoder_hidden_states_mask=embeds[MASK].to(latents.device),
            img_shapes=[[(1, side, side)]] * len(latents),
        ).sample

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        normed: Tensor = denoiser.txt_norm(embeds[TOKENS])
        return normed

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        return super().pipeline_arguments(shortened(embeds), shortened(null))

    def pipeline_guidance(self, scale: float) -> dict[str, float]:
        return {"true_cfg_scale": scale}
