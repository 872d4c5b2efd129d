"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross-attention, ε- or v-prediction."""

from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from torch import Tensor

from esd_peft.backbones.backbone import Backbone, PromptEmbeds


class StableDiffusion(Backbone):
    """Scopes are rules over the UNet's module names: `attn2` is cross-attention, `attn1` self-attention.

    The bank, the target and the loss are the same for ε- and v-prediction: the guided target is linear in the
    predictions (see `esd_peft.objectives`), and the pipeline's scheduler knows which of the two it steps with.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")
    denoiser_part: ClassVar[str] = "unet"

    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """`{"encoder_hidden_states": [prompts, tokens, width]}`, padded to the tokenizer's length as the pipeline does."""
        tokenizer, encoder = self.load_part("tokenizer"), self.load_part("text_encoder", dtype).to(device).eval()
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(encoder.config, "use_attention_mask", False)
        parts = zip(tokens.input_ids.to(device).split(64), tokens.attention_mask.to(device).split(64), strict=True)
        made = [encoder(ids, attention_mask=mask if masked else None)[0] for ids, mask in parts]
        return {"encoder_hidden_states": torch.cat(made)}

    def unseen_words(self, prompt: str) -> list[str]:
        tokenizer = self.load_part("tokenizer")
        return [word for word in prompt.split() if len(tokenizer.tokenize(word)) != 1]

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        height, width = _pair(denoiser.config.sample_size)
        return torch.randn(count, denoiser.config.in_channels, height, width, generator=generator)

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        return denoiser(latents, timesteps, **embeds).sample

    def in_scope(self, scope: str, name: str) -> bool:
        parts = name.split(".")
        if scope == "esd-x-strict":
            return "attn2" in parts and ("to_k" in parts or "to_v" in parts)
        return {
            "esd-x": "attn2" in parts,
            "esd-u": "attn2" not in parts,
            "selfattn": "attn1" in parts,
            "full": True,
        }[scope]

    def reads_prompt(self, name: str) -> bool:
        return self.in_scope("esd-x-strict", name)

    def token_embeddings(self, embeds: PromptEmbeds) -> Tensor:
        return embeds["encoder_hidden_states"].flatten(0, 1)

    def picture_size(self, denoiser: ModelMixin) -> tuple[int, int]:
        factor = 2 ** (len(self.load_part("vae").config.block_out_channels) - 1)
        height, width = _pair(denoiser.config.sample_size)
        return height * factor, width * factor

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        vae = self.load_part("vae").to(device)
        latents = []
        for part in pictures.split(8):
            posterior = vae.encode(part.to(device) * 2 - 1).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            latents.append((posterior.mean.cpu() + posterior.std.cpu() * noise) * vae.config.scaling_factor)
        return torch.cat(latents)

    def pipeline(self, denoiser: ModelMixin, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        vae = self.load_part("vae", dtype)
        if vae.config.sample_size > 256:
            vae.enable_slicing()  # one picture at a time: at 512² each takes about a gigabyte
        pipe = self.pipeline_class(
            unet=denoiser,
            vae=vae,
            text_encoder=self.load_part("text_encoder", dtype),
            tokenizer=self.load_part("tokenizer"),
            scheduler=self.load_part("scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
