"""The paper's target and its loss (eq. 6 and 7), for any learner.

The target is `e_anchor − η (e_concept − e_null)`; e_anchor is e_null unless the concept is mapped to something. The target
is an affine combination of predictions: the coefficients add up to one. v-predictions and flow-matching velocities are
affine in ε for a given x_t, so the same formula holds for them, if student and teacher use the same prediction type. A
layer's output has a target of the same form.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from esd_kernels import guided_mse
from esd_peft.training.batch import Batch
from esd_peft.training.learners import Outputs

Loss = Callable[[Outputs, Batch], Tensor]
WEIGHT_DECAY = 0.0


def guided_loss(made: Outputs, batch: Batch) -> Tensor:
    """Return the weighted mean squared error of the student's outputs `[B, ...]` to their guided targets, as `[]` fp32.

    It is the mean over the outputs of `(weight * (made - target) ** 2).mean() / size`, with
    `target = anchor - eta * (e_concept - e_null)`. Dividing by `size`, the mean square of e_concept − e_null, makes its unit
    the same for every model, method and layer: the share of what the concept does. The kernel (`esd_kernels.guided_mse`)
    reads the teacher's answers as they lie in the batch, e_null above e_concept, and never writes the target down.
    """
    anchor = batch.anchor or {}
    losses = [
        guided_mse(output, batch.teacher[name], batch.eta, anchor.get(name), batch.weight / batch.sizes[name])
        for name, output in made.items()
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
