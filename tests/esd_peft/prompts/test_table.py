"""Pairs of prompts as rows of embeddings."""

import pytest
import torch

from esd_peft.errors import UserError
from esd_peft.models.family import MASK
from esd_peft.options.prompts import PromptOptions
from esd_peft.prompts.plan import plan_prompts
from esd_peft.prompts.table import check_distinct


@pytest.mark.parametrize(
    ("value", "says"), [(0.0, "answer the same to 'star' and ''"), (float("nan"), "make no numbers of 'star'")]
)
def test_concepts_are_told_from_what_stands_there_without_them(value, says):
    """Masks differ by length, which says nothing of the words."""
    plan = plan_prompts(PromptOptions(concept=["circle", "star"]), None)
    draws = torch.Generator().manual_seed(0)
    embeds = {"encoder_hidden_states": torch.randn(len(plan.texts), 4, 8, generator=draws)}
    embeds[MASK] = torch.eye(len(plan.texts), 4)
    check_distinct(plan, embeds)
    embeds["encoder_hidden_states"][[plan.texts.index("star"), plan.texts.index("")]] = value
    if value == 0:
        check_distinct(plan, embeds | {"pooled_projections": torch.randn(len(plan.texts), 8, generator=draws)})
    else:
        embeds["encoder_hidden_states"][plan.texts.index("")] = 1.0
    with pytest.raises(UserError, match=f"--model: its text encoders {says}"):
        check_distinct(plan, embeds)
