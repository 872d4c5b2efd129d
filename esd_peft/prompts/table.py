"""The pairs of a prompt plan as rows of prompt embeddings."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.models import PromptEmbeds
from esd_peft.models.family import MASK
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime.devices import send


@dataclass
class PairTable:
    """`P` pairs; the first `num_concept_pairs` erase, the others preserve."""

    embeds: PromptEmbeds
    prompts: Tensor  # [P] int64, the row that names the concept
    neutrals: Tensor  # [P] int64
    anchors: Tensor | None  # [P] int64, where some pair has an anchor; pairs without one name their neutral row
    etas: Tensor  # [P] fp32
    weights: Tensor  # [P] fp32
    concepts: list[list[int]]  # for each concept its pairs, the plain prompt first
    num_concept_pairs: int

    def __len__(self) -> int:
        return len(self.prompts)


def check_distinct(plan: PromptPlan, embeds: PromptEmbeds) -> None:
    """Raise `UserError` if the text encoders give a concept and its neutral prompt the same embeddings, or NaN.

    Nothing could be learned of the two, and the closed form has no solution. `embeds` are those of `plan.texts`.
    """
    row, values = {text: i for i, text in enumerate(plan.texts)}, [v for k, v in embeds.items() if k != MASK]
    for pairs in plan.concept_pairs:
        prompt, neutral = pairs[0].prompt, pairs[0].neutral
        concept, without = ([value[row[text]] for value in values] for text in (prompt, neutral))
        if not all(value.isfinite().all() for value in (*concept, *without)):
            raise UserError(f"--model: its text encoders make no numbers of {prompt!r}; restore their weights")
        if all(map(torch.equal, concept, without)):
            raise UserError(
                f"--model: its text encoders answer the same to {prompt!r} and {neutral!r}, so there is nothing to erase; "
                "restore their weights"
            )


def make_table(plan: PromptPlan, embeds: PromptEmbeds) -> PairTable:
    """Make the table of the plan's pairs; `embeds` are those of `plan.texts`."""
    pairs, row = plan.pairs, {text: i for i, text in enumerate(plan.texts)}
    device = next(iter(embeds.values())).device
    numbers = iter(range(len(pairs)))
    concepts = [[*itertools.islice(numbers, len(group))] for group in plan.concept_pairs]
    anchors = torch.tensor([row[p.anchor_prompt] for p in pairs])
    return PairTable(
        {name: value[: len(plan.paired_texts)].clone() for name, value in embeds.items()},
        send(torch.tensor([row[p.prompt] for p in pairs]), device),
        send(torch.tensor([row[p.neutral] for p in pairs]), device),
        send(anchors, device) if any(p.anchor is not None for p in pairs) else None,
        send(torch.tensor([p.eta for p in pairs]), device),
        send(torch.tensor([p.weight for p in pairs]), device),
        concepts,
        sum(map(len, concepts)),
    )
