"""The model under attack, and the loss by which attacks are led: its own denoising loss on images of the concept."""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from esd_peft.models import ModelFamily, PromptEmbeds


@dataclass
class Victim:
    """An erased model, all of it known to the attacker. Text encoders and denoiser are on the device together."""

    family: ModelFamily
    denoiser: ModelMixin
    encoders: DiffusionPipeline  # tokenizers and text encoders; see `load_encoders`
    device: torch.device
    dtype: torch.dtype
    nfe: int = 0  # of the denoiser, so far

    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Encode with gradients for what learns in the encoders."""
        return self.family.encode_prompts(self.encoders, prompts, self.device)

    @torch.no_grad()
    def encode_frozen(self, prompts: list[str]) -> PromptEmbeds:
        """The embeddings of however many prompts, without gradients."""
        return self.family.encode_many(self.encoders, prompts, self.device, self.device)

    def denoising_loss(self, embeds: PromptEmbeds, latents: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error `[]` fp32 of the denoiser's prediction for `latents` `[B, ...]` with fresh noise: what training
        a diffusion model minimises. `generator` is the CPU's."""
        noise = torch.randn(latents.shape, generator=generator)
        levels = torch.rand(len(latents), generator=generator)
        inputs, timesteps, right = (x.to(self.device) for x in self.family.noise_schedule.add_noise(latents, noise, levels))
        seen = self.family.predict(self.denoiser, inputs.to(self.dtype), timesteps, embeds)
        self.nfe += 3 * len(latents)
        return (seen.float() - right).square().mean()


def load_encoders(family: ModelFamily, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
    """The pipeline's tokenizers and text encoders, frozen, on the device."""
    pipe = family.assemble(family.text_parts, dtype).to(device)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    return pipe
