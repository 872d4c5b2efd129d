"""The interface of a pipeline family, and what families have in common."""

import functools
import inspect
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.models import scopes
from esd_peft.models.checkpoint_layout import CheckpointLayout
from esd_peft.models.noise_schedule import NoiseSchedule, as_kind
from esd_peft.models.prompt_reader import PromptEmbeds as PromptEmbeds
from esd_peft.models.prompt_reader import PromptReader
from esd_peft.options.model import SCOPES, DrawingOptions
from esd_peft.worlds import World

TOKENS = "encoder_hidden_states"  # the token embeddings among the prompt embeddings
SIDES = ("height", "width")
MASK = "encoder_attention_mask"  # which of them count, where a family has padding that does not


class ModelFamily(PromptReader):
    """The interface of a kind of model, and the parts that all kinds share; see `PipelineDirectory` for the arguments.

    A family must have `pipeline_class`, `text_parts`, `denoiser_part`, `prompt_arguments`, `encode_prompts` and `predict`.
    It may override what is not `final`: how it reads prompts (`PromptReader`), draws, names its layers and writes its files.
    """

    # Required of a family, besides `encode_prompts`
    prompt_arguments: ClassVar[dict[str, str]]  # of the pipeline's call, for each of the prompt embeddings

    @abstractmethod
    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """Return the denoiser's prediction, in its parameterisation, for scaled latents `[B, ...]` and timesteps `[B]`."""

    # How it draws
    world: World | None = None  # the embedded benchmark, if the pipeline ships with the package
    guidance_scale: float = 3.0  # of trajectories, where the config leaves it out
    takes_guidance: bool = True  # whether its pipeline can draw with classifier-free guidance
    num_inference_steps: int = 25
    default_latent_size: tuple[int, int] | None = None  # the pipeline's, if the denoiser's config has none
    patch: ClassVar[int] = 2  # image sides are multiples of this number of latents

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        """Draw standard normal noise `[count, ...]` fp32 in the latent shape, on the CPU."""
        return torch.randn(count, denoiser.config.in_channels, *self.latent_size(denoiser), generator=generator)

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        """Return the arguments that the pipeline passes to its scheduler besides the number of steps."""
        return {}

    def guide(self, null: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Apply classifier-free guidance from `null` `[B, ...]` towards the other prediction; `scale` 1 is no guidance."""
        return null + scale * (towards - null)

    def unpack_latents(self, latents: Tensor) -> Tensor:
        """Convert the denoiser's latents to `[B, channels, height, width]`, with frames after the channels if the VAE has
        them.
        """
        return latents

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Invert `unpack_latents`."""
        return latents

    @functools.cached_property
    def vae_factor(self) -> int:
        """Pixels of a latent, along each side."""
        config = self.load_config("vae")
        levels = config.get("block_out_channels") or config["encoder_block_out_channels"]  # the latter of Sana's
        return 2 ** (len(levels) - 1)

    def vae_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """Convert the denoiser's latents to those that `vae` decodes; both are on its device."""
        return self.unpack_latents(latents) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)

    def denoiser_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """Invert `vae_latents`."""
        return self.pack_latents((latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Encode images `[N, 3, H, W]` in [0, 1] to latents of the denoiser, fp32 on the CPU."""
        vae = self.load_part("vae").to(device)
        latents = []
        for part in images.split(8):
            encoded = vae.encode(part.to(device) * 2 - 1)
            if hasattr(encoded, "latent"):  # an autoencoder that is not variational
                latents.append(encoded.latent.cpu())
            else:
                posterior = encoded.latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator)
                latents.append(posterior.mean.cpu() + posterior.std.cpu() * noise)
        return self.denoiser_latents(vae.cpu(), torch.cat(latents))

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        """Return the arguments of the pipeline call for prompts and as many null prompts, at default settings."""
        names = self.prompt_arguments
        prompts = {names[key]: value for key, value in embeds.items()}
        nulls = {f"negative_{names[key]}": value for key, value in null.items()}
        settings: dict[str, Any] = {"negative_prompt": None, "num_inference_steps": self.num_inference_steps}
        if self.default_latent_size:
            settings |= {side: n * self.vae_factor for side, n in zip(SIDES, self.default_latent_size, strict=True)}
            settings["use_resolution_binning"] = False  # PixArt's and Sana's, to the sizes that they know
        arguments = prompts | nulls | settings | self.pipeline_guidance(self.guidance_scale)
        takes = inspect.signature(self.pipeline_class.__call__).parameters  # some know no negative prompt
        return {name: value for name, value in arguments.items() if name in takes}

    def pipeline_guidance(self, scale: float) -> dict[str, float]:
        """Return the pipeline call's argument for a guidance scale; a `scale` of 1 is no guidance."""
        return {"guidance_scale": scale}

    def draw(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        """Call `pipe` and return its images `[B, 3, H, W]` in [0, 1]."""
        images: Tensor = pipe(**arguments, output_type="pt").images
        return images

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the pipeline runs a VAE that is loaded in `dtype`."""
        return dtype

    # Its layers
    def in_scope(self, scope: str, name: str) -> bool:
        """Return whether the denoiser's module or parameter `name` belongs to `scope`."""
        return scopes.cross_attention(scope, name)

    def cross_attention(self, denoiser: ModelMixin) -> list[str]:
        """Return the names of the transformer blocks with cross-attention to the prompt (diffusers' `norm2`, `attn2`, then
        `norm3`, `ff`).

        Empty if text and image attend to each other, or tokens are masked.
        """
        return []

    def prompt_input(self, name: str) -> str | None:
        """Return the prompt embeddings that are the only input of the denoiser's layer `name`; None for most layers."""
        return TOKENS if self.in_scope("esd-x-strict", name) else None

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        """Return the embeddings `kind` as their layers receive them: `[prompts, tokens, width]`."""
        value = embeds[kind]
        return value if value.dim() == 3 else value.unsqueeze(1)

    # Its files in other tools
    denoiser_is_a_file: ClassVar[bool] = False  # ComfyUI's "Load Diffusion Model" reads it alone, under diffusers' names
    lora_markers: ClassVar[tuple[str, ...]] = ()  # parts of layers' names, one of which Invoke must find in a LoRA
    lora_skips: ClassVar[tuple[str, ...]] = ()  # beginnings of layers' names that ComfyUI does not take from a LoRA

    @property
    def checkpoint_layout(self) -> CheckpointLayout | None:
        """The kind's names in single-file checkpoints and kohya's LoRAs; None if its tools read diffusers' names."""
        return None

    def save_lora(self, directory: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Write the denoiser's LoRA as the file that this family's `load_lora_weights` reads by default, if it has one."""
        if not hasattr(self.pipeline_class, "save_lora_weights"):
            return
        part = self.denoiser_part
        options = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": metadata}
        self.pipeline_class.save_lora_weights(directory, **options)

    # What all families have in common
    @final
    def draw_at(self, options: DrawingOptions) -> None:
        """Set the resolution and prompt length. Raises `UserError` for values that this family does not support."""
        if options.resolution is not None:
            step, most = self.patch * self.vae_factor, self.load_config(self.denoiser_part).get("pos_embed_max_size")
            if self.world and options.resolution != self.world.image_size:
                raise UserError(f"--resolution: the embedded pipeline draws {self.world.image_size} pixels; leave it out")
            if options.resolution % step:
                nearest = max(1, round(options.resolution / step)) * step
                raise UserError(f"--resolution {options.resolution} is no multiple of {step}; use {nearest}")
            if most is not None and options.resolution > most * step:
                raise UserError(
                    f"--resolution {options.resolution} is more than this model has positions for; use {most * step}"
                )
            self.default_latent_size = (options.resolution // self.vae_factor,) * 2
        if options.max_sequence_length is not None:
            if not self.reads_long_prompts:
                raise UserError(
                    f"--max-sequence-length is for T5 and language models, and {self.path} has none; leave it out"
                )
            self.max_sequence_length = options.max_sequence_length

    @final
    def latent_size(self, denoiser: ModelMixin) -> tuple[int, int]:
        """Return height and width of the latents: those of `draw_at`, or of the denoiser's config."""
        size = self.default_latent_size or denoiser.config.sample_size
        if size is None:
            raise UserError(f"{self.part(self.denoiser_part).place} has no sample_size in its config.json; write it there")
        return (size, size) if isinstance(size, int) else tuple(size)

    @final
    def image_size(self, denoiser: ModelMixin) -> tuple[int, int]:
        """Return height and width of the images, in pixels."""
        (height, width), factor = self.latent_size(denoiser), self.vae_factor
        return height * factor, width * factor

    @final
    def set_timesteps(
        self, noise: Tensor, num_inference_steps: int, kind: str | None = None
    ) -> tuple[SchedulerMixin, Tensor]:
        """Return the pipeline's scheduler, set to a new trajectory of `num_inference_steps` from `noise`, and the first
        latents.

        `kind` replaces the scheduler's class (a class of diffusers) and keeps its config.
        """
        scheduler = as_kind(self.load_part("scheduler"), kind)
        retrieve_timesteps(
            scheduler, num_inference_steps, noise.device, **self.schedule(scheduler, noise, num_inference_steps)
        )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler, noise * getattr(scheduler, "init_noise_sigma", 1.0)

    @final
    def scale_input(self, scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
        """Scale latents to the input of the denoiser. Flow-matching schedulers do not scale."""
        return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents

    @final
    def scheduler_step(
        self, scheduler: SchedulerMixin, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Return the next latents; schedulers that draw noise use `generator`."""
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        return scheduler.step(prediction, timestep, latents, **extra).prev_sample

    @final
    @functools.cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the scheduler in the directory; every trajectory gets its own scheduler."""
        return NoiseSchedule(self.load_part("scheduler"), self.path)

    @final
    def pipeline(self, denoiser: ModelMixin, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """Return the family's diffusers pipeline around `denoiser`, for calls with `pipeline_arguments`; VAE in `dtype`.

        It has no text encoders: they are freed before the denoiser is loaded, and FLUX's would not fit next to it. Pipelines
        that upcast a VAE with `force_upcast` to fp32 (SDXL's) do so under autocast too.
        """
        vae = in_its_dtype(self.load_part("vae", dtype).to(device))
        if vae.config.get("sample_size", 512) > 256 and hasattr(vae, "enable_slicing"):
            vae.enable_slicing()  # one image at a time: at 512² each takes about a gigabyte
        return self.assemble(("scheduler",), dtype, vae=vae, **{self.denoiser_part: denoiser})

    @final
    @functools.cached_property
    def has_cross_attention(self) -> bool:
        """True if the denoiser has separable cross-attention blocks (`cross_attention`)."""
        return bool(self.cross_attention(self.empty_denoiser()))

    @final
    def scope_modules(self, denoiser: ModelMixin, scope: str) -> list[str]:
        """Return the names of the Linear and Conv2d layers in `scope`. Raises `UserError` if there are none.

        Grouped convolutions, such as Sana's depthwise ones, are left out: PEFT adapts only those whose groups divide the
        rank, and a depthwise 3x3 kernel has fewer weights than its factors.
        """
        layers = [(name, module) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return self._in_scope(scope, [name for name, module in layers if getattr(module, "groups", 1) == 1])

    @final
    def scope_parameters(self, denoiser: ModelMixin, scope: str) -> list[str]:
        """Return the names of the parameters in `scope`. Raises `UserError` if there are none."""
        return self._in_scope(scope, [name for name, _ in denoiser.named_parameters()])

    @final
    def _in_scope(self, scope: str, names: list[str]) -> list[str]:
        chosen = [name for name in names if self.in_scope(scope, name)]
        if not chosen:
            others = [s for s in SCOPES if any(self.in_scope(s, name) for name in names)]
            raise UserError(f"--scope {scope} selects nothing in this model; these select something: {', '.join(others)}")
        return chosen


def in_its_dtype(vae: ModelMixin) -> ModelMixin:
    """Make the VAE decode in its own dtype, also under autocast."""
    decode = vae.decode

    @functools.wraps(decode)
    def decode_as_is(latents: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *args, **options)

    vae.decode = decode_as_is
    return vae


def index_embeds(embeds: PromptEmbeds, index: Tensor) -> PromptEmbeds:
    """Rows of the prompt embeddings: `index` is `[B]` int64."""
    return {name: value[index] for name, value in embeds.items()}
