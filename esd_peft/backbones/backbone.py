"""The interface of a pipeline family."""

import functools
import importlib
import inspect
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor

from esd_peft.errors import UserError

# What the denoiser is told about each prompt, under the names of its forward arguments: each [prompts, ...].
PromptEmbeds = dict[str, Tensor]


class Backbone(ABC):
    """A pipeline directory, its parts loaded one at a time.

    Args:
        path: the directory.
        index: its parsed `model_index.json`.
        option: the option that named it, for messages.

    Raises:
        UserError: a part that the family needs is missing.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    parts: ClassVar[tuple[str, ...]]
    denoiser_part: ClassVar[str]

    def __init__(self, path: Path, index: dict[str, Any], option: str = "--model") -> None:
        self.path, self.index, self.option = path, index, option
        for part in self.parts:
            if index.get(part) in (None, [None, None]) or not (path / part).is_dir():
                raise UserError(f"{option} {path} lacks its {part}; restore that folder")

    def load_part(self, part: str, dtype: torch.dtype = torch.float32) -> Any:
        """One component, on the CPU. Reads safetensors only. Raises `UserError` if it cannot be loaded."""
        library, name = self.index[part]
        module = importlib.import_module(library)
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
        if "Tokenizer" in name or "Scheduler" in name:
            options = {}
        try:
            return getattr(module, name).from_pretrained(self.path, subfolder=part, local_files_only=True, **options)
        except Exception as error:  # the libraries raise many kinds for a damaged or missing file
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{self.option} {self.path}: its {part} cannot be loaded ({reason})") from None

    def load_denoiser(self, dtype: torch.dtype) -> ModelMixin:
        """The network that is trained and merged, frozen, in eval mode."""
        denoiser: ModelMixin = self.load_part(self.denoiser_part, dtype)
        return denoiser.requires_grad_(False).eval()

    def empty_denoiser(self) -> ModelMixin:
        """The denoiser's structure on the meta device, without weights."""
        library, name = self.index[self.denoiser_part]
        family = getattr(importlib.import_module(library), name)
        with torch.device("meta"):
            return family.from_config(family.load_config(self.path, subfolder=self.denoiser_part))

    def new_scheduler(self, num_inference_steps: int, device: torch.device) -> SchedulerMixin:
        """The pipeline's own scheduler, set to a fresh trajectory of that many steps."""
        scheduler = self.load_part("scheduler")
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler

    def scheduler_step(
        self, scheduler: SchedulerMixin, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The next latents; schedulers that draw noise draw it from `generator`."""
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        return scheduler.step(prediction, timestep, latents, **extra).prev_sample

    def save_lora(self, directory: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the denoiser's LoRA as the file that this family's `load_lora_weights` reads by default."""
        part = self.denoiser_part
        options = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        self.pipeline_class.save_lora_weights(directory, **options)

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Text encoders in, embeddings out, text encoders freed. The null prompt is ""."""

    @abstractmethod
    def unseen_words(self, prompt: str) -> list[str]:
        """Words that the tokenizer has no token for as a whole."""

    @abstractmethod
    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        """Standard normal noise `[count, ...]` fp32 in the latent shape, on the CPU."""

    @abstractmethod
    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The denoiser's prediction, in its own parameterisation, for scaled latents `[B, ...]` and timesteps `[B]`."""

    @abstractmethod
    def in_scope(self, scope: str, name: str) -> bool:
        """Whether the denoiser's module or parameter `name` belongs to `scope`."""

    @abstractmethod
    def reads_prompt(self, name: str) -> bool:
        """Whether the denoiser's layer `name` is fed the prompt's token embeddings, as `token_embeddings` gives them."""

    @abstractmethod
    def token_embeddings(self, embeds: PromptEmbeds) -> Tensor:
        """What the layers that read the prompt are fed: `[prompts * tokens, width]`."""

    @abstractmethod
    def picture_size(self, denoiser: ModelMixin) -> tuple[int, int]:
        """Height and width in pixels of the pictures the denoiser was made for."""

    @abstractmethod
    def encode_pictures(self, pictures: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Latents of `[N, 3, H, W]` pictures in [0, 1], scaled as the denoiser knows them, fp32 on the CPU."""

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Loss weights `[B]` fp32 of min-SNR (arXiv 2303.09556): min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v.

        Raises `UserError` for a scheduler without the noise schedule (ᾱ) of a diffusion model.
        """
        kept = self.noise_schedule().to(timesteps.device)[timesteps.long()]
        snr = kept / (1 - kept)
        return snr.clamp(max=gamma) / (snr if self.predicts_noise else snr + 1)

    @property
    def predicts_noise(self) -> bool:
        """Whether the denoiser's prediction is ε, and not v."""
        return bool(self._scheduler.config.prediction_type == "epsilon")

    def noise_schedule(self) -> Tensor:
        """ᾱ `[num_train_timesteps]` fp32. Raises `UserError` for a scheduler that is not of a diffusion model."""
        if not hasattr(self._scheduler, "alphas_cumprod"):
            name = type(self._scheduler).__name__
            raise UserError(f"--snr-gamma and --objective contrastive need a diffusion noise schedule, which {name} has not")
        return self._scheduler.alphas_cumprod.float()

    @functools.cached_property
    def _scheduler(self) -> SchedulerMixin:
        """To read from; every trajectory gets a scheduler of its own."""
        return self.load_part("scheduler")

    @abstractmethod
    def pipeline(self, denoiser: ModelMixin, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """The family's diffusers pipeline around `denoiser`, to make pictures; its other parts in `dtype`."""


def pick(embeds: PromptEmbeds, index: Tensor) -> PromptEmbeds:
    """Rows of the prompt embeddings: `index` is `[B]` int64."""
    return {name: value[index] for name, value in embeds.items()}
