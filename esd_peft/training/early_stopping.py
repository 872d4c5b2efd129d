"""How much of the concept is left in the student's predictions: the measure behind `--stop-at`."""

import torch
from torch import Tensor

from esd_peft.models.family import index_embeds
from esd_peft.options.training import BufferOptions, TrainingOptions
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.seeds import generator
from esd_peft.training.buffer import Buffer
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import held_out_rollout

EVERY, MOST = 5, 40  # optimizer steps between two measurements, at least; measurements of a run, at most
SAMPLES = 16  # a measurement costs as many NFE, or one for each concept where there are more


class EarlyStopping:
    """Held-out samples, from a trajectory for each concept that training never sees.

    The student's prediction s moves from e_concept (a fraction of 1) over e_null (0) to the target (−η); the fraction is
    that of s − e_null along d = e_concept − e_null, summed over the samples: Σ⟨s − e_null, d⟩ / Σ⟨d, d⟩.
    """

    def __init__(
        self,
        rollout: Rollout,
        table: PairTable,
        options: BufferOptions,
        stop_at: float,
        steps: int,
        generator: torch.Generator,
    ) -> None:
        self.rollout, self.table, self.stop_at = rollout, table, stop_at
        self.every = max(EVERY, steps // MOST)
        pairs = torch.tensor([pairs[-1] for pairs in table.concepts])  # not the plain prompt, if there are others
        # all of the trajectories show the concept, however many there are, and whatever the student has learned by now
        options = held_out_rollout(options)
        with rollout.profiler.phase("rollout"):
            held_out = rollout.collect(table, pairs, options, generator, progress=False)
        each = max(1, SAMPLES // len(pairs))
        chosen = torch.cat([_evenly_spaced((held_out.pairs == pair).nonzero().squeeze(1), each) for pair in pairs])
        self.samples: Buffer = held_out.index(chosen, rollout.student.device)
        self.curve: list[tuple[int, float]] = []  # step, fraction

    def enough(self, step: int) -> bool:
        """Whether the fraction now is at or below `stop_at`."""
        return self.measure(step) <= self.stop_at

    @torch.no_grad()
    def measure(self, step: int) -> float:
        """The fraction now; also added to the curve."""
        samples, table = self.samples, self.table
        embeds = index_embeds(table.embeds, table.prompts[samples.pairs])
        prediction = self.rollout.student.predict(samples.inputs, samples.timesteps, embeds)
        self.rollout.profiler.nfe += len(samples)
        null, concept = samples.teacher[:2].float()
        direction = concept - null
        fraction = ((prediction.float() - null) * direction).sum() / direction.square().sum()
        self.curve.append((step, fraction.item()))
        return self.curve[-1][1]


def make_early_stopping(
    rollout: Rollout, table: PairTable, buffer: BufferOptions, training: TrainingOptions
) -> EarlyStopping | None:
    """None where all steps are taken."""
    if training.stop_at is None:
        return None
    return EarlyStopping(
        rollout, table, buffer, training.stop_at, training.max_train_steps, generator(training.seed, "probe")
    )


def _evenly_spaced(items: Tensor, count: int) -> Tensor:
    """Up to `count` of the items."""
    return items[torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()]
