"""What families with an MMDiT have in common: text and image in the same attention layers, flow matching."""

from typing import Any, ClassVar

from esd_peft.models import scopes
from esd_peft.models.family import TOKENS, ModelFamily

POOLED = "pooled_projections"


class JointAttention(ModelFamily):
    """Scopes: `scopes.joint_attention`."""

    denoiser_part: ClassVar[str] = "transformer"
    prompt_arguments: ClassVar[dict[str, str]] = {TOKENS: "prompt_embeds", POOLED: "pooled_prompt_embeds"}

    def in_scope(self, scope: str, name: str) -> bool:
        return scopes.joint_attention(scope, name)

    def prompt_input(self, name: str) -> str | None:
        if name.split(".")[0] == "context_embedder":
            return TOKENS
        return POOLED if "text_embedder.linear_1" in name else None


def shift_of(config: dict[str, Any], max_shift: float) -> tuple[float, ...]:
    """What diffusers' `calculate_shift` takes from a scheduler's config, with the pipelines' defaults."""
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
    return tuple(config.get(name, default) for name, default in defaults.items())
