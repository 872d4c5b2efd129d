"""The loss of the guided target, weighted."""

import pytest
import torch

from esd_peft.training.batch import Batch
from esd_peft.training.learners import PREDICTION
from esd_peft.training.target import guided_loss
from esd_peft.training.trajectory_samples import collate
from runs import ETA, STEPS, method_of, noise, prepare_short


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("anchored", [False, True])
def test_the_loss_is_the_mean_over_outputs_in_shares_of_what_the_concept_does(dtype, anchored):
    """Against the formula in fp64, with its gradient."""
    shapes, sizes = {"a": (4, 3, 5), "b": (7, 1)}, {"a": 0.3, "b": 11.0}
    made = {name: draw(3, *shape, dtype=dtype).requires_grad_() for name, shape in shapes.items()}
    teacher = {name: draw(6, *shape, dtype=dtype) for name, shape in shapes.items()}
    anchor = {name: draw(3, 1, *shape, dtype=dtype)[:, 0] for name, shape in shapes.items()}
    eta, weight = torch.tensor([1.0, -1.0, 2.5]), torch.tensor([1.0, 10.0, 0.5])
    units = {name: torch.tensor(size) for name, size in sizes.items()}
    batch = Batch(made, {}, teacher, eta, weight, anchor if anchored else None, units)
    loss, expected = guided_loss(made, batch), 0.0
    loss.backward()
    wide = {name: value.detach().double().requires_grad_() for name, value in made.items()}
    for name, output in wide.items():
        null, named = teacher[name].double().chunk(2)
        target = (anchor[name].double() if anchored else null) - eta.view(-1, *[1] * (null.dim() - 1)) * (named - null)
        each = (output - target).square().flatten(1).mean(1)
        expected = expected + (weight * each).mean() / sizes[name] / 2
    expected.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in made.items():
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(value.grad.double(), wide[name].grad, **tolerance)


def test_what_the_loss_says_does_not_depend_on_the_scale_of_predictions(model):
    """A student that is the teacher yet misses all of what the concept does, at η = 1: one whole of it, twice over."""
    ours = prepare_short(model, concept=["circle"], negative_guidance=1.0, preservation_ratio=0.0)
    buffer = ours.collect([0], noise())
    null, named = buffer.teacher.double()
    sizes = {PREDICTION: (named - null).square().mean().float()}
    batch = collate(buffer, ours.table, sizes, STEPS, [])
    assert guided_loss({PREDICTION: buffer.teacher[1]}, batch).item() == pytest.approx(4.0, rel=1e-4)
    assert guided_loss({PREDICTION: buffer.teacher[0]}, batch).item() == pytest.approx(1.0, rel=1e-4)


def test_weights_of_concepts(model):
    ours = prepare_short(model, concept=[{"name": "circle", "weight": 3.0}])
    buffer = ours.collect([0], noise())
    batch = collate(buffer, ours.table, {PREDICTION: torch.tensor(1.0)}, STEPS, [])
    null, concept = buffer.teacher.double()
    expected = (3 * (null - (null - ETA * (concept - null))).square().flatten(1).mean(1)).mean()
    loss = method_of(ours).loss({PREDICTION: buffer.teacher[0]}, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
