"""The noise schedule of a pipeline's scheduler: noise levels of training, and their timesteps."""

import functools
from pathlib import Path

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from esd_peft.errors import UserError


def as_kind(scheduler: SchedulerMixin, kind: str | None) -> SchedulerMixin:
    """Return the scheduler, or the same config as the class `kind` of diffusers."""
    return scheduler if kind is None else getattr(diffusers, kind).from_config(scheduler.config)


class NoiseSchedule:
    """The noise schedule of the pipeline in `path`; it only reads `scheduler`."""

    def __init__(self, scheduler: SchedulerMixin, path: Path) -> None:
        self.scheduler, self.path = scheduler, path

    @property
    def is_flow_matching(self) -> bool:
        """True if the denoiser predicts a flow from noise to images."""
        has_noise_schedule = hasattr(self.scheduler, "alphas_cumprod") or self._counts_log_sigma
        return not has_noise_schedule or bool(self.scheduler.config.get("use_flow_sigmas"))

    @functools.cached_property
    def _counts_log_sigma(self) -> bool:
        """True if timesteps are (log σ)/4, from about 1 down to below 0, as for EDM and continuous Euler."""
        every = getattr(self.scheduler, "timesteps", None)
        return every is not None and float(every.min()) < 0

    def training_timesteps(self, timesteps: Tensor) -> Tensor:
        """Convert a scheduler's `timesteps` to timesteps of training (0 is the least noisy); fp32 or as given.

        They are equal, except for schedulers with timesteps (log σ)/4, whose timesteps lie between two of training.
        """
        if not self._counts_log_sigma:
            return timesteps
        every = self.scheduler.timesteps.float().to(timesteps.device).flip(0).contiguous()
        above = torch.searchsorted(every, timesteps.float().contiguous()).clamp(1, len(every) - 1)
        low, high = every[above - 1], every[above]
        between = ((timesteps.float() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return (above - 1 + between) * ((self.scheduler.config.num_train_timesteps - 1) / (len(every) - 1))

    def add_noise(self, latents: Tensor, noise: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return training inputs x_t, timesteps `[B]`, and the correct predictions.

        Diffusion: x_t = √ᾱ x_0 + √(1−ᾱ) ε, predicted is ε, or v = √ᾱ ε − √(1−ᾱ) x_0. Flow matching: x_t = (1−σ) x_0 + σ ε,
        predicted is ε − x_0. `levels` `[B]` in [0, 1) are shares of the training timesteps, of which 0 is the least noisy;
        all on one device, fp32.
        """
        column = (-1, *[1] * (latents.dim() - 1))
        signal, rest = (share.view(column) for share in self.shares(levels))
        noisy = signal * latents + rest * noise
        if self.is_flow_matching:
            return noisy, levels * self.scheduler.config.num_train_timesteps, noise - latents
        timesteps = (levels * len(self.alphas_cumprod())).long()
        right = noise if self.predicts_noise else signal * noise - rest * latents
        return noisy, self.scheduler_timesteps(timesteps), right

    def shares(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of image and noise in x_t at `levels` of `add_noise`, each `[B]`."""
        if self.is_flow_matching:
            return 1 - levels, levels
        kept = self.alphas_cumprod().to(levels.device)
        kept = kept[(levels * len(kept)).long()]
        return kept.sqrt(), (1 - kept).sqrt()

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Return the loss weights `[num_train_timesteps]` fp32 of min-SNR (arXiv 2303.09556): min(SNR, γ)/SNR for ε,
        min(SNR, γ)/(SNR + 1) for v.

        Raises `UserError` for a scheduler without the noise schedule (ᾱ) of a diffusion model.
        """
        kept = self.alphas_cumprod()
        snr = kept / (1 - kept)
        return snr.clamp(max=gamma) / (snr if self.predicts_noise else snr + 1)

    def scheduler_timesteps(self, timesteps: Tensor) -> Tensor:
        """Convert `timesteps` of training to those of the denoiser, int64: the inverse of `training_timesteps`."""
        return self.scheduler.timesteps.flip(0).to(timesteps.device)[timesteps] if self._counts_log_sigma else timesteps

    def at_timesteps(self, table: Tensor, timesteps: Tensor) -> Tensor:
        """Interpolate `table` `[num_train_timesteps]` at a scheduler's `timesteps`."""
        last = len(table) - 1
        places = self.training_timesteps(timesteps).float().clamp(0, last)
        below = places.long()
        return torch.lerp(table[below], table[(below + 1).clamp(max=last)], places - below)

    @property
    def predicts_noise(self) -> bool:
        """True if the denoiser predicts ε; False for v or a flow."""
        return self.scheduler.config.get("prediction_type") == "epsilon"

    def alphas_cumprod(self) -> Tensor:
        """Return ᾱ `[num_train_timesteps]` fp32. Raises `UserError` for a scheduler that is not of a diffusion model."""
        if self.is_flow_matching or not hasattr(self.scheduler, "alphas_cumprod"):
            raise UserError(
                "--snr-gamma, --method contrastive and attacks that learn need a diffusion model's noise schedule, "
                f"which {self.path} with its {type(self.scheduler).__name__} has not; leave them out"
            )
        return self.scheduler.alphas_cumprod.float()
