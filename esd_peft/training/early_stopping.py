"""How much of the concept is left in the student's predictions: the measure behind `--until`."""

import dataclasses

import torch
from torch import Tensor

from esd_peft.models.family import pick
from esd_peft.training.rollout import Bank, Rollout

EVERY = 5  # optimizer steps between measurements
TUPLES = 16  # a measurement costs as many forwards, or one for each concept where there are more


class Probe:
    """Held-out guided pairs, from a trajectory per concept that training never sees.

    The student's prediction s moves from e_concept (a fraction of 1) over e_null (0) to the target (−η); the fraction is
    that of s − e_null along d = e_concept − e_null, summed over the pairs: Σ⟨s − e_null, d⟩ / Σ⟨d, d⟩.
    """

    def __init__(self, rollout: Rollout, generator: torch.Generator) -> None:
        # all of the trajectories show the concept, however many there are
        self.rollout = dataclasses.replace(rollout, config=rollout.config.model_copy(update={"anticipate": 0}))
        pairs = torch.tensor([pairs[-1] for pairs in rollout.table.concepts])  # not the plain wording
        with self.rollout.costs.phase("rollout"):
            bank = self.rollout.fill(pairs, generator, progress=False)
        each = max(1, TUPLES // len(pairs))
        spread = [_spread((bank.pairs == pair).nonzero().squeeze(1), each) for pair in pairs]
        self.bank: Bank = bank.take(torch.cat(spread), self.rollout.device)
        self.curve: list[tuple[int, float]] = []  # step, fraction

    def enough(self, step: int) -> bool:
        """Whether the fraction now is at or below the config's `until`."""
        until = self.rollout.config.until
        return until is not None and self.measure(step) <= until

    @torch.no_grad()
    def measure(self, step: int) -> float:
        """The fraction now; also added to the curve."""
        rollout, bank = self.rollout, self.bank
        with rollout.autocast():
            embeds = pick(rollout.table.embeds, rollout.table.prompts[bank.pairs])
            seen = rollout.backbone.predict(rollout.denoiser, bank.inputs.to(rollout.dtype), bank.timesteps, embeds)
        rollout.costs.forward_equivalents += len(bank)
        null, concept = bank.teacher[:2].float()
        direction = concept - null
        fraction = ((seen.float() - null) * direction).sum() / direction.square().sum()
        self.curve.append((step, fraction.item()))
        return self.curve[-1][1]


def _spread(items: Tensor, count: int) -> Tensor:
    """Up to `count` of the items, evenly spaced."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()]
