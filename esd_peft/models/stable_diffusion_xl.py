"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, and the image's size as a condition."""

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionXLPipeline
from torch import Tensor

from esd_peft.models.checkpoint_layout import CheckpointLayout
from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.stable_diffusion import StableDiffusion, embedded_guidance
from esd_peft.runtime.devices import send


class StableDiffusionXL(StableDiffusion):
    """Scopes are those of the paper. The pooled embedding, which `add_embedding` reads together with the size, is in none
    but `esd-u` and `full`, as in the authors' script.

    The null prompt is what the pipeline guides by where no negative prompt is named: zeros, if the pipeline's
    `force_zeros_for_empty_prompt` says so (SDXL base does), and not the embedding of "". Size conditions are the pipeline's
    defaults: the denoiser's own size, not cropped.

    SDXL-Turbo is known by what sets it apart from all that descends from SDXL base: it was made for 512² and predicts noise
    on trailing timesteps. It gets the 4 steps without guidance it was made for. Of Lightning and Hyper the files say
    nothing: give --num-inference-steps and --guidance-scale 1.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}

    @property
    def checkpoint_layout(self) -> CheckpointLayout:
        encoders = {"text_encoder": "conditioner.embedders.0.", "text_encoder_2": "conditioner.embedders.1."}
        return CheckpointLayout("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", encoders, original_lora_names=True)

    @property
    def few_step(self) -> bool:
        settings, size = self.noise_schedule.scheduler.config, self.load_config(self.denoiser_part).get("sample_size")
        usual = settings.get("rescale_betas_zero_snr") or settings.get("timestep_spacing") != "trailing"
        turbo = not usual and self.noise_schedule.predicts_noise and isinstance(size, int) and size <= 64
        return turbo or super().few_step

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        overflows = dtype == torch.float16 and self.load_config("vae").get("force_upcast", True)
        return torch.float32 if overflows else dtype

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 77, 2048]` and `text_embeds` `[prompts, 1280]`."""
        tokens, _, pooled, _ = pipe.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipe.config.force_zeros_for_empty_prompt:
            null = torch.tensor([not prompt for prompt in prompts], device=device)
            tokens, pooled = tokens.masked_fill(null[:, None, None], 0), pooled.masked_fill(null[:, None], 0)
        return {TOKENS: tokens, "text_embeds": pooled}

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        height, width = (side * self.vae_factor for side in latents.shape[-2:])
        sizes = send(torch.tensor([height, width, 0, 0, height, width], dtype=latents.dtype), latents.device)
        added = {"text_embeds": embeds["text_embeds"], "time_ids": sizes.expand(len(latents), -1)}
        guidance = embedded_guidance(denoiser, latents)
        return denoiser(latents, timesteps, embeds[TOKENS], timestep_cond=guidance, added_cond_kwargs=added).sample
