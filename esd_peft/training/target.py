"""The paper's target and its loss (eq. 6 and 7), for any learner.

The target `e_anchor − η (e_concept − e_null)`, the anchor being e_null where the concept is mapped to nothing, is a linear
combination of predictions whose coefficients add up to one. Velocity and flow predictions are linear in ε for a given x_t,
so the target holds for them as it stands, as long as the student is compared in the same parameterisation. A layer's output
has a target of the same form.
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
    """Weighted mean squared error between what the student has made, `[B, ...]` each, and the guided target, `[]` fp32.

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
