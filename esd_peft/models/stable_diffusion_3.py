"""Stable Diffusion 3 and 3.5: two CLIP text encoders and a T5 that may be left out, an MMDiT, flow matching."""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import POOLED, JointAttention, shift_of


class StableDiffusion3(JointAttention):
    """Scopes: `scopes.joint_attention`. SD 3.5 medium's image-only attention (`attn2`) is self-attention."""

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusion3Pipeline
    denoiser_is_a_file: ClassVar[bool] = True
    text_parts: ClassVar[tuple[str, ...]] = (
        "tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder", "text_encoder_2", "text_encoder_3",
    )  # fmt: skip
    optional_parts: ClassVar[tuple[str, ...]] = ("tokenizer_3", "text_encoder_3")

    @property
    def reads_long_prompts(self) -> bool:
        return self.has("text_encoder_3")

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 77 + 256, 4096]` and `pooled_projections` `[prompts, 2048]`."""
        if pipe.text_encoder_3 is None:
            pipe.transformer = self.empty_denoiser()  # its config has the width of the zeros that replace T5
        options = {"do_classifier_free_guidance": False, "max_sequence_length": self.prompt_length}
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device=device, **options)
        return {TOKENS: tokens, POOLED: pooled}

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        """SD 3.5's own shift is fixed; with dynamic shifting it depends on the size of the image."""
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        patch = self.load_config(self.denoiser_part)["patch_size"]
        length = (latents.shape[-2] // patch) * (latents.shape[-1] // patch)
        return {"mu": calculate_shift(length, *shift_of(config, max_shift=1.16))}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        return denoiser(latents, timestep=timesteps, **embeds).sample
