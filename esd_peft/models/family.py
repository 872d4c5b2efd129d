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
    """What one kind of model does in its own way, and what all have in common; see `PipelineDirectory` for the arguments.

    A family must have `pipeline_class`, `text_parts`, `denoiser_part`, `prompt_arguments`, `encode_prompts` and `predict`.
    It may override what is not `final`: how it reads prompts (`PromptReader`), draws, names its layers and writes its files.
    """

    # What a family must have, beside `encode_prompts`
    prompt_arguments: ClassVar[dict[str, str]]  # of the pipeline's call, for each of the prompt embeddings

    @abstractmethod
    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The denoiser's prediction, in its own parameterisation, for scaled latents `[B, ...]` and timesteps `[B]`."""

    # How it draws
    world: World | None = None  # what it draws, if it ships with the package
    guidance_scale: float = 3.0  # of trajectories, where the config leaves it out
    takes_guidance: bool = True  # whether its pipeline can draw with classifier-free guidance
    num_inference_steps: int = 25
    default_latent_size: tuple[int, int] | None = None  # where the denoiser's config names none: its pipeline's
    patch: ClassVar[int] = 2  # latents, of whose multiples images have to be

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        """Standard normal noise `[count, ...]` fp32 in the latent shape, on the CPU."""
        return torch.randn(count, denoiser.config.in_channels, *self.latent_size(denoiser), generator=generator)

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        """What the pipeline tells its scheduler besides the number of steps."""
        return {}

    def guide(self, null: Tensor, towards: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: from the prediction `null` `[B, ...]` towards the other; a `scale` of 1 is none."""
        return null + scale * (towards - null)

    def unpack_latents(self, latents: Tensor) -> Tensor:
        """The denoiser's latents as `[B, channels, height, width]`, with frames after the channels if the VAE has them."""
        return latents

    def pack_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `unpack_latents`."""
        return latents

    @functools.cached_property
    def vae_factor(self) -> int:
        """Pixels a latent, along each side."""
        config = self.load_config("vae")
        levels = config.get("block_out_channels") or config["encoder_block_out_channels"]  # the latter of Sana's
        return 2 ** (len(levels) - 1)

    def vae_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """What `vae` decodes for the denoiser's latents, which are on its device."""
        return self.unpack_latents(latents) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)

    def denoiser_latents(self, vae: ModelMixin, latents: Tensor) -> Tensor:
        """The inverse of `vae_latents`."""
        return self.pack_latents((latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator, device: torch.device) -> Tensor:
        """Latents of `[N, 3, H, W]` images in [0, 1], as the denoiser knows them, fp32 on the CPU."""
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
        """What the pipeline is called with for prompts and as many null prompts, to make images of the usual kind."""
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
        """The argument of the pipeline's call that says how far it guides; without guidance `scale` is 1."""
        return {"guidance_scale": scale}

    def draw(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        """What `pipe` makes of them: `[B, 3, H, W]` in [0, 1]."""
        images: Tensor = pipe(**arguments, output_type="pt").images
        return images

    def decoding_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which its pipeline lets a VAE work that is loaded in `dtype`."""
        return dtype

    # Its layers
    def in_scope(self, scope: str, name: str) -> bool:
        """Whether the denoiser's module or parameter `name` belongs to `scope`."""
        return scopes.cross_attention(scope, name)

    def cross_attention(self, denoiser: ModelMixin) -> list[str]:
        """Names of the transformer blocks in which the image attends to the prompt's tokens (diffusers' `norm2` and `attn2`,
        then `norm3` and `ff`); none where text and image attend to each other, or tokens are masked."""
        return []

    def prompt_input(self, name: str) -> str | None:
        """Which of the prompt embeddings the denoiser's layer `name` is fed, and nothing else; none for most layers."""
        return TOKENS if self.in_scope("esd-x-strict", name) else None

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        """The embeddings `kind` as the layers that read them are fed them: `[prompts, tokens, width]`."""
        value = embeds[kind]
        return value if value.dim() == 3 else value.unsqueeze(1)

    # Its files in other tools
    denoiser_is_a_file: ClassVar[bool] = False  # ComfyUI's "Load Diffusion Model" reads it alone, under diffusers' names
    lora_known_by: ClassVar[tuple[str, ...]] = ()  # parts of layers' names, one of which Invoke must find in a LoRA
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
        """Draw images and read prompts as `options` say. Raises `UserError` for what this family cannot do."""
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
        """Height and width of the latents that it draws: those the denoiser was made for, or as `draw_at` was told."""
        size = self.default_latent_size or denoiser.config.sample_size
        if size is None:
            raise UserError(f"{self.part(self.denoiser_part).place} has no sample_size in its config.json; write it there")
        return (size, size) if isinstance(size, int) else tuple(size)

    @final
    def image_size(self, denoiser: ModelMixin) -> tuple[int, int]:
        """Height and width in pixels of the images the denoiser was made for."""
        (height, width), factor = self.latent_size(denoiser), self.vae_factor
        return height * factor, width * factor

    @final
    def set_timesteps(
        self, noise: Tensor, num_inference_steps: int, kind: str | None = None
    ) -> tuple[SchedulerMixin, Tensor]:
        """The pipeline's own scheduler, set to a fresh trajectory of that many steps from `noise`, and its first latents;
        of another `kind` (a class of diffusers), if one is named, with the same config."""
        scheduler = as_kind(self.load_part("scheduler"), kind)
        retrieve_timesteps(
            scheduler, num_inference_steps, noise.device, **self.schedule(scheduler, noise, num_inference_steps)
        )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler, noise * getattr(scheduler, "init_noise_sigma", 1.0)

    @final
    def scale_input(self, scheduler: SchedulerMixin, latents: Tensor, timestep: Tensor) -> Tensor:
        """Latents as the denoiser is fed them. Flow-matching schedulers leave them as they are."""
        return scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents

    @final
    def scheduler_step(
        self, scheduler: SchedulerMixin, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The next latents; schedulers that draw noise draw it from `generator`."""
        takes = inspect.signature(scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        return scheduler.step(prediction, timestep, latents, **extra).prev_sample

    @final
    @functools.cached_property
    def noise_schedule(self) -> NoiseSchedule:
        """Of the scheduler in the directory; every trajectory gets a scheduler of its own."""
        return NoiseSchedule(self.load_part("scheduler"), self.path)

    @final
    def pipeline(self, denoiser: ModelMixin, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """The family's diffusers pipeline around `denoiser`, called with `pipeline_arguments`; VAE in `dtype`.

        It has no text encoders: what encodes is freed before the denoiser is loaded, and FLUX's would not fit beside it.
        Pipelines that bring a VAE with `force_upcast` to fp32 for its work (SDXL's) do so under autocast too.
        """
        vae = in_its_dtype(self.load_part("vae", dtype).to(device))
        if vae.config.get("sample_size", 512) > 256 and hasattr(vae, "enable_slicing"):
            vae.enable_slicing()  # one image at a time: at 512² each takes about a gigabyte
        return self.assemble(("scheduler",), dtype, vae=vae, **{self.denoiser_part: denoiser})

    @final
    @functools.cached_property
    def has_cross_attention(self) -> bool:
        """Whether there are such blocks (`cross_attention`)."""
        return bool(self.cross_attention(self.empty_denoiser()))

    @final
    def scope_modules(self, denoiser: ModelMixin, scope: str) -> list[str]:
        """Names of the Linear and Conv2d layers in `scope`. Raises `UserError` if there are none.

        Grouped convolutions, such as Sana's depthwise ones, are left out: PEFT adapts none whose groups do not divide the
        rank, and a depthwise kernel of 3x3 has fewer weights than its factors would have.
        """
        layers = [(name, module) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        return self._in_scope(scope, [name for name, module in layers if getattr(module, "groups", 1) == 1])

    @final
    def scope_parameters(self, denoiser: ModelMixin, scope: str) -> list[str]:
        """Names of the parameters in `scope`. Raises `UserError` if there are none."""
        return self._in_scope(scope, [name for name, _ in denoiser.named_parameters()])

    @final
    def _in_scope(self, scope: str, names: list[str]) -> list[str]:
        chosen = [name for name in names if self.in_scope(scope, name)]
        if not chosen:
            others = [s for s in SCOPES if any(self.in_scope(s, name) for name in names)]
            raise UserError(f"--scope {scope} selects nothing in this model; these select something: {', '.join(others)}")
        return chosen


def in_its_dtype(vae: ModelMixin) -> ModelMixin:
    """The VAE, which decodes in the dtype that it is in, whatever autocast says."""
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
