"""Z-Image and Z-Image-Turbo: Qwen3's tokens, a transformer with one stream of text and image tokens, flow matching."""

from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, ZImagePipeline
from torch import Tensor

from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.models.joint_attention import JointAttention, evenly_shifted
from esd_peft.models.masked_tokens import encode_tokens, token_lists

_TURBO_SHIFT = 3.0  # of the scheduler


class ZImage(JointAttention):
    """Scopes: `scopes.joint_attention`. The prompt comes in through `cap_embedder`; text alone is what `context_refiner`
    sees, and the 30 layers after it see text and image with the same weights.

    The pipeline's guidance scale g is added to the prediction, which is 1 + g here: without guidance it is 0 there. The
    denoiser predicts x_0 − ε at 1 − t, so its answer is negated.

    Turbo is distilled: trajectories have 8 steps and no guidance. It is known by its scheduler's shift, 3 where the base has
    6; with another scheduler give --num-inference-steps 8 and --guidance-scale 1.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]] = ZImagePipeline
    denoiser_is_a_file: ClassVar[bool] = True
    text_parts: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    default_latent_size: tuple[int, int] | None = (128, 128)
    guidance_scale: float = 5.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        scheduler = self.load_part("scheduler").config
        if scheduler.get("shift", scheduler.get("flow_shift")) == _TURBO_SHIFT:
            self.guidance_scale, self.num_inference_steps = 1.0, 8

    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """`encoder_hidden_states` `[prompts, 512, 2560]` and their mask `[prompts, 512]`."""
        texts = [self.templated(pipe.tokenizer, prompt) for prompt in prompts]
        return encode_tokens(pipe, texts, device, layer=-2, padding="max_length", length=self.prompt_length)

    def templated(self, tokenizer: Any, text: str) -> str:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        text_with_template: str = tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)
        return text_with_template

    def schedule(self, scheduler: SchedulerMixin, latents: Tensor, num_inference_steps: int) -> dict[str, Any]:
        return evenly_shifted(scheduler, latents.shape[2] // 2 * (latents.shape[3] // 2), num_inference_steps)

    def predict(self, denoiser: ModelMixin, latents: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        images = list(latents.unsqueeze(2))  # of one frame each
        outputs = denoiser(images, (1000 - timesteps) / 1000, token_lists(embeds), return_dict=False)[0]
        return -torch.stack(outputs).squeeze(2)

    def prompt_rows(self, denoiser: ModelMixin, embeds: PromptEmbeds, kind: str) -> Tensor:
        normed: Tensor = denoiser.cap_embedder[0](embeds[TOKENS])
        return normed

    def pipeline_arguments(self, embeds: PromptEmbeds, null: PromptEmbeds) -> dict[str, Any]:
        lists = {"prompt_embeds": token_lists(embeds), "negative_prompt_embeds": token_lists(null)}
        return super().pipeline_arguments({}, {}) | lists

    def pipeline_guidance(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": max(scale - 1.0, 0.0)}
