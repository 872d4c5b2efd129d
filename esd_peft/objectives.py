"""From guided pairs to a loss.

The guided target `e_anchor − η · (e_concept − e_null)` is a linear combination of predictions whose coefficients
add up to one. Velocity and flow predictions are linear in ε for a given x_t, so the target holds for them as it
stands, as long as the student is compared in the same parameterisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esd_kernels import guided_mse
from esd_peft.rollout import Bank


@dataclass
class Task:
    """What the student is asked about a batch of tuples: with which prompts, and how far past nothing."""

    prompts: Tensor  # [B] int64, rows of the prompt embeddings
    eta: Tensor  # [B] fp32


def esd_task(batch: Bank, eta: float, held: int) -> Task:
    """The paper's objective (eq. 6); the last `held` samples hold the student's unconditional prediction instead.

    A held sample is asked with the null prompt and has η = 0, so its target is e_null. Without them e_null moves along
    with e_concept, and classifier-free guidance, which amplifies their difference, undoes part of the erasure.
    """
    prompts, size = batch.prompts.clone(), len(batch)
    etas = torch.full((size,), eta, device=prompts.device)
    if held:
        prompts[size - held :] = 0
        etas[size - held :] = 0.0
    return Task(prompts, etas)


def esd_loss(prediction: Tensor, batch: Bank, task: Task) -> Tensor:
    """Mean squared error to the guided target, `[]` fp32."""
    return guided_mse(prediction, batch.teacher.flatten(0, 1), task.eta)
