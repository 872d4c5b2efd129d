"""Other names for a concept, as the teacher sees it: what it draws for them is what it draws for the concept.

Of a word that is another name for the concept the direction e_word − e_null is the concept's, e_concept − e_null, at the
same x_t; of what merely resembles it, or stands beside it in the text encoder, it is another one. Of a fox on the embedded
emoji pipeline vixen and sly are found so, and dog and heart told apart.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.models.family import index_embeds
from esd_peft.prompts.wordings import Candidate, Wordings
from esd_peft.training.buffer import Buffer
from esd_peft.training.student import Student
from esd_peft.training.work import LOOKED_AT

SAME, OTHER = 0.6, 0.4  # from this cosine on it is another name; below that one it is something else


@dataclass(frozen=True)
class Verdict:
    """Of one concept's candidates."""

    same: list[Candidate]  # to be erased with it
    others: list[Candidate]  # to be kept; those in between are left to themselves
    nfe: int = 0  # what that took


@torch.no_grad()
def judge(student: Student, wordings: Wordings, concept: int, trajectory: Buffer, batch_size: int) -> Verdict:
    """Sort the candidates of the `concept`-th concept, along one `trajectory` of it that the teacher has driven."""
    candidates = wordings.candidates[concept]
    if not candidates:
        return Verdict([], [])
    rows = wordings.index(candidate.text for candidate in candidates)
    likeness = torch.zeros(len(rows))
    for place in LOOKED_AT:
        sample = trajectory.index(torch.tensor([int(place * len(trajectory))]), student.device)
        null, named = sample.teacher[:2].float().flatten(1)
        for part in torch.arange(len(rows)).split(batch_size):
            embeds = {name: value.to(student.device) for name, value in index_embeds(wordings.embeds, rows[part]).items()}
            many = sample.inputs.expand(len(part), *sample.inputs.shape[1:])
            with student.teacher():
                predicted = student.predict(many, sample.timesteps.expand(len(part)), embeds)
            likeness[part] += _likeness(predicted, null, named).cpu() / len(LOOKED_AT)
    judged = list(zip(candidates, likeness.tolist(), strict=True))
    return Verdict(
        [c for c, like in judged if like >= SAME], [c for c, like in judged if like < OTHER], len(LOOKED_AT) * len(rows)
    )


def _likeness(predicted: Tensor, null: Tensor, named: Tensor) -> Tensor:
    return torch.cosine_similarity(predicted.float().flatten(1) - null, (named - null).expand(len(predicted), -1))
