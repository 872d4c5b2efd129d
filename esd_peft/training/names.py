"""Other names for a concept, as the teacher sees it: what it draws for them is what it draws for the concept.

Of a word that is another name for the concept the direction e_word − e_null is the concept's, e_concept − e_null, at the
same x_t; of what merely resembles it, or stands beside it in the text encoder, it is another one. Of a fox on the embedded
emoji pipeline vixen and sly are found so, and dog and heart told apart.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.prompts.wordings import Candidate, Wordings
from esd_peft.training.buffer import Buffer
from esd_peft.training.student import Student
from esd_peft.training.work import LOOKED_AT

SAME, OTHER = 0.7, 0.5  # from this mean cosine on it is another name; below that one it is something else
OPEN = 0.4  # below this one along the first trajectory, it is not looked at again


@dataclass(frozen=True)
class Verdict:
    """Of one concept's candidates."""

    same: list[Candidate]  # to be erased with it
    others: list[Candidate]  # to be kept; those in between are left to themselves
    nfe: int = 0  # what that took


@torch.no_grad()
def judge(student: Student, wordings: Wordings, concept: int, trajectories: list[Buffer], batch_size: int) -> Verdict:
    """Sort the candidates of the `concept`-th concept, along `trajectories` of it that the teacher has driven.

    At one x_t or another a neighbour may look like another name (a tulip like a rose, with a cosine of 0.8), along several
    trajectories it does not. What is nothing like it along the first is not looked at again.
    """
    candidates = wordings.candidates[concept]
    likeness, nfe, open_ = torch.zeros(len(candidates)), 0, torch.arange(len(candidates))
    for number, trajectory in enumerate(trajectories if candidates else []):
        found = _likeness(student, wordings, [candidates[i].text for i in open_], trajectory, batch_size)
        likeness[open_] += (found - likeness[open_]) / (number + 1)
        nfe += len(LOOKED_AT) * len(open_)
        if number == 0:
            open_ = (likeness >= OPEN).nonzero().squeeze(1)
        if not len(open_):
            break
    judged = list(zip(candidates, likeness.tolist(), strict=True))
    return Verdict([c for c, like in judged if like >= SAME], [c for c, like in judged if like < OTHER], nfe)


def _likeness(student: Student, wordings: Wordings, texts: list[str], trajectory: Buffer, batch_size: int) -> Tensor:
    """Of each text the mean cosine of its direction and the concept's, `[texts]`."""
    embeds, likeness = wordings.encoded(texts), torch.zeros(len(texts))
    for place in LOOKED_AT:
        sample = trajectory.index(torch.tensor([int(place * len(trajectory))]), student.device)
        null, named = sample.teacher[:2].float().flatten(1)
        with student.teacher():
            predicted = student.predict_each(sample, embeds, batch_size)
        cosines = torch.cosine_similarity(predicted - null, (named - null).expand(len(texts), -1))
        likeness += cosines.cpu() / len(LOOKED_AT)
    return likeness


def near(verdicts: Sequence[Verdict]) -> list[str]:
    """Prompts of one word that are like a concept and are held, once, the nearest of each first."""
    words = [[c.text for c in verdict.others if c.is_word] for verdict in verdicts]
    return list(dict.fromkeys(text for rank in itertools.zip_longest(*words) for text in rank if text is not None))


def to_texts(verdicts: Sequence[Verdict]) -> list[list[list[str]]]:
    """Of each concept the candidates that are other names, and those that are something else."""
    return [[[candidate.text for candidate in side] for side in (v.same, v.others)] for v in verdicts]


def to_verdicts(wordings: Wordings, texts: list[list[list[str]]]) -> list[Verdict]:
    """The inverse of `to_texts`; on another machine some may be no candidates."""
    known = [{candidate.text: candidate for candidate in group} for group in wordings.candidates]
    return [
        Verdict([own[text] for text in same if text in own], [own[text] for text in others if text in own])
        for own, (same, others) in zip(known, texts, strict=True)
    ]
