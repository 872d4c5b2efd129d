"""The paper's objective: the guided target, and the loss on the student's prediction (eq. 6 and 7).

The target `e_anchor − η (e_concept − e_null)`, the anchor being e_null where the concept is mapped to nothing, is a linear
combination of predictions whose coefficients add up to one. Velocity and flow predictions are linear in ε for a given x_t,
so the target holds for them as it stands, as long as the student is compared in the same parameterisation.
"""

import dataclasses
from collections.abc import Callable

from torch import Tensor

from esd_kernels import guided_mse
from esd_peft.models import ModelFamily
from esd_peft.runtime.devices import send
from esd_peft.training.batches import Batch

Loss = Callable[[Tensor, Batch], Tensor]
WEIGHT_DECAY = 0.0


def esd_loss(prediction: Tensor, batch: Batch) -> Tensor:
    """Weighted mean squared error between the student's `prediction` `[B, ...]` and the guided target, `[]` fp32.

    It is `(weight * (prediction - target) ** 2).mean()` with `target = anchor - eta * (e_concept - e_null)`. The kernel
    (`esd_kernels.guided_mse`) reads the teacher's predictions as they lie in the batch, e_null above e_concept,
    and never writes the target down.
    """
    return guided_mse(prediction, batch.teacher, batch.eta, batch.anchor, batch.weight)


def min_snr_loss(loss: Loss, family: ModelFamily, gamma: float) -> Loss:
    """`loss` with each sample weighted by min-SNR (arXiv 2303.09556) at its timestep.

    Raises `UserError` for a model without a diffusion noise schedule.
    """
    schedule = family.noise_schedule
    table = schedule.min_snr_weights(gamma)

    def weighted(prediction: Tensor, batch: Batch) -> Tensor:
        nonlocal table
        table = send(table, batch.timesteps.device)
        weight = batch.weight * schedule.at_timesteps(table, batch.timesteps)
        return loss(prediction, dataclasses.replace(batch, weight=weight))

    return weighted
