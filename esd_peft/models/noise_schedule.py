"""The noise schedule of a pipeline's scheduler: noise levels of training, and their timesteps."""

import functools
from pathlib import Path

import diffusers
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

    @property
    def is_known(self) -> bool:
        """`add_noise` can say what noise the denoiser was trained on: it cannot for EDM's schedulers."""
        return self.is_flow_matching or hasattr(self.scheduler, "alphas_cumprod")

    @functools.cached_property
    def _counts_log_sigma(self) -> bool:
        """True if timesteps are (log σ)/4, from about 1 down to below 0, as for EDM and continuous Euler."""
        every = getattr(self.scheduler, "timesteps", None)
        return every is not None and float(every.min()) < 0

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

    def scheduler_timesteps(self, timesteps: Tensor) -> Tensor:
        """Convert `timesteps` of training to those of the denoiser, int64."""
        return self.scheduler.timesteps.flip(0).to(timesteps.device)[timesteps] if self._counts_log_sigma else timesteps

    @property
    def predicts_noise(self) -> bool:
        """True if the denoiser predicts ε; False for v or a flow."""
        return self.scheduler.config.get("prediction_type") == "epsilon"

    def alphas_cumprod(self) -> Tensor:
        """Return ᾱ `[num_train_timesteps]` fp32. Raises `UserError` for a scheduler that is not of a diffusion model."""
        if self.is_flow_matching or not hasattr(self.scheduler, "alphas_cumprod"):
            raise UserError(
                "--method contrastive and attacks that learn need a diffusion model's noise schedule, "
                f"which {self.path} with its {type(self.scheduler).__name__} has not; leave them out"
            )
        return self.scheduler.alphas_cumprod.float()
