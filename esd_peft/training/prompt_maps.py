"""What the layers that read the prompt are kept off, and what they start from: linear maps of the prompt embeddings."""

import torch
from diffusers import ModelMixin
from torch import Tensor

from esd_peft.config import EraseConfig
from esd_peft.models import Backbone, PromptEmbeds
from esd_peft.models.family import MASK
from esd_peft.prompts.plan import PromptPlan
from esd_peft.training.closed_form import solve
from esd_peft.training.nullspace import null_space_projection

PromptMaps = dict[str, Tensor]  # for each kind of prompt embeddings that a layer reads, a map [width, width] fp32


@torch.no_grad()
def prompt_maps(
    config: EraseConfig, plan: PromptPlan, backbone: Backbone, denoiser: ModelMixin, embeds: PromptEmbeds, layers: list[str]
) -> tuple[PromptMaps, PromptMaps]:
    """Projections (`esd_peft.training.nullspace`) and changes (`esd_peft.training.closed_form`) for the `layers` that learn.

    Either is empty where the config does without it, or where none of the layers reads the prompt and nothing else.
    `embeds` are those of `plan.texts`, on the denoiser's device.
    """
    row = {text: i for i, text in enumerate(plan.texts)}
    projections: PromptMaps = {}
    changes: PromptMaps = {}
    for kind in sorted({kind for layer in layers if (kind := backbone.prompt_input(layer)) is not None}):
        rows = backbone.prompt_rows(denoiser, embeds, kind)  # [texts, tokens, width]
        counts = embeds[MASK].bool() if MASK in embeds else rows.new_ones(rows.shape[:2], dtype=torch.bool)

        def words(prompts: list[str], rows: Tensor = rows, counts: Tensor = counts) -> Tensor:
            index = torch.tensor([row[prompt] for prompt in prompts], device=rows.device)
            return rows[index][counts[index]]

        if config.protected_energy:
            projections[kind] = null_space_projection(words(plan.protected), config.protected_energy)
        if config.closed_form and config.objective == "esd":
            pairs = torch.tensor([(row[p.prompt], row[p.goal]) for p in plan.erasing_pairs], device=rows.device)
            concept, target = _word_by_word(rows, counts, *pairs.T)
            changes[kind] = solve(concept, target, words(plan.kept), projections.get(kind))
    return projections, changes


def _word_by_word(rows: Tensor, counts: Tensor, prompts: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `prompts` that count, and of `goals` the ones in the same places; past its end a goal's last one."""
    last = counts[goals].sum(dim=1, keepdim=True) - 1
    places = torch.arange(rows.shape[1], device=rows.device).minimum(last)
    target = rows[goals].take_along_dim(places[:, :, None], dim=1)
    here = counts[prompts]
    return rows[prompts][here], target[here]
