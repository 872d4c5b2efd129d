"""Common parts of families with a video VAE: normalized latents with frames; an image is one frame."""

import functools

import torch
from diffusers import ModelMixin
from torch import Tensor

from esd_peft.models.family import ModelFamily


class VideoLatents(ModelFamily):
    """Latents are `[B, channels, frames, height, width]` for the VAE, and normalized channel by channel for the denoiser."""

    @functools.cached_property
    def vae_factor(self) -> int:
        config = self.load_config("vae")
        factor: int = config.get("scale_factor_spatial") or 2 ** len(config["temperal_downsample"])
        return factor

    def vae_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return self.unpack_latents(latents) * std + mean

    def denoiser_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return self.pack_latents((latents - mean) / std)

    def encode_images(self, images: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        return super().encode_images(images.unsqueeze(2), generator, device)


def _statistics(vae: ModelMixin, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, `[channels, 1, 1, 1]`, as `latents` are."""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean.to(latents), std.to(latents)
