"""Wan 2.1 and 2.2 TI2V, text to video: UMT5's tokens, a transformer with cross-attention on video latents, flow matching."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, WanPipeline
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.tensors import rename_tensors
from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.video_latents import VideoLatents

# of layers, in the original code's files, as ComfyUI reads them and diffusers too
_ORIGINAL_NAMES = {
    "transformer.": "diffusion_model.", "attn1.to_": "self_attn.", "attn2.to_": "cross_attn.", "attn.out.0": "attn.o",
    "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2", "proj_out": "head.head", "time_proj.": "time_projection.1.",
    "condition_embedder.": "", "_embedder.linear_1": "_embedding.0", "_embedder.linear_2": "_embedding.2",
}  # fmt: skip


class Wan(VideoLatents):
    """Scopes are those of the paper (`scopes.cross_attention`). Keys and values read the tokens through `text_embedder`,
    which is in none but `esd-u` and `full`.

    Trajectories and images are videos of one frame, in the size of the pipeline's default: what learns are the weights that
    draw videos, too. Wan 2.2 A14B has two such transformers, one for much noise and one for little, and is refused.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = WanPipeline
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    denoiser_part: ClassVar[str] = "transformer"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds"}
    default_latent_size: tuple[int, int] = (60, 104)  # 480 x 832
    guidance_scale: float = 5.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._timestep_per_token = bool(self.index.get("expand_timesteps"))  # TI2V's
        height, width = self.default_latent_size
        self.default_latent_size = 8 * height // self.vae_factor, 8 * width // self.vae_factor  # TI2V's VAE has 16

    @classmethod
    def check_index(cls, index: dict[str, Any], place: str) -> None:
        second = index.get("transformer_2") not in (None, [None, None])
        if second or index.get("boundary_ratio") is not None:  # where one gives way to the other
            raise UserError(
                f"{place} has two transformers, for much noise and for little, and an adapter here changes one; name a Wan "
                "that has one: 2.1, or 2.2 TI2V 5B"
            )

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`{"encoder_hidden_states": [prompts, 512, 4096]}`."""
        options = {"max_sequence_length": self.prompt_length, "do_classifier_free_guidance": False, "device": device}
        return {TOKENS: pipe.encode_prompt(prompts, **options)[0]}

    def initial_latents(self, count: int, denoiser: ModelMixin, generator: torch.Generator) -> Tensor:
        return super().initial_latents(count, denoiser, generator).unsqueeze(2)

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        if self._timestep_per_token:
            timesteps = timesteps[:, None].expand(-1, latents[0, 0, :, ::2, ::2].numel())
        return denoiser(latents, timestep=timesteps, **embeds).sample

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        projected: Tensor = denoiser.condition_embedder.text_embedder(embeds[TOKENS])
        return projected

    def save_lora(self, directory: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        super().save_lora(directory, layers, metadata)
        rename_tensors(directory / "pytorch_lora_weights.safetensors", _original_name)

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        return super().pipeline_arguments(embeds, null) | {"num_frames": 1}

    def draw(self, pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
        frames: Tensor = pipe(**arguments, output_type="pt").frames
        return frames[:, 0]


def _original_name(name: str) -> str:
    for ours, theirs in _ORIGINAL_NAMES.items():
        name = name.replace(ours, theirs)
    return name
