"""guided_mse, the kernel itself (on a GPU, or interpreted on the CPU), against the formula in fp64."""

import collections
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esd_kernels import fused_guided_mse, guided_mse, guided_mse_reference, unit_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a gradient that is scaled in the backward pass is rounded twice, there and in the kernel's store: half an ulp each;
# the interpreter's bf16 stores truncate, which is a whole one
GRAD_RTOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3 if DEVICE == "cuda" else 1.2e-2}
SHAPES = [(1, 4, 8, 8), (1, 1), (3, 41, 5), (2, 4, 32, 32), (5, 7, 13, 17), (65, 3), (2, 4, 3, 5, 7), (300, 2, 3)]


def formula(student, teacher, eta, anchor=None, weight=None):
    """The loss and the student's gradient, written out in fp64."""
    student, teacher = student.detach().double(), teacher.double()
    batch, n = len(student), student[0].numel()
    column = (batch, *(1,) * (student.dim() - 1))
    eta = torch.as_tensor(eta, dtype=torch.float64, device=student.device).expand(batch).reshape(column)
    weight = torch.ones(batch, dtype=torch.float64, device=student.device) if weight is None else weight.double()
    anchor = teacher[:batch] if anchor is None else anchor.double()
    error = student - (anchor - eta * (teacher[batch:] - teacher[:batch]))
    per_sample = error.square().flatten(1).mean(1)
    return (weight * per_sample).mean(), 2 * weight.reshape(column) * error / (batch * n)


def inputs(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    batch, rest = shape[0], shape[1:]
    student = draw(*shape).requires_grad_()
    per_sample = torch.rand(2, batch, generator=generator).to(DEVICE)
    return student, draw(2 * batch, *rest), per_sample[0] * 3, draw(*shape), per_sample[1]


def check(student, teacher, eta, anchor=None, weight=None):
    expected, expected_grad = formula(student, teacher, eta, anchor, weight)
    loss = guided_mse(student, teacher, eta, anchor, weight)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, student, unit_gradient(loss))
    assert grad.dtype == student.dtype and grad.shape == student.shape
    # half precision has a floor below which gradients become subnormal or zero
    floor = {torch.float32: 1e-9, torch.float16: 6e-8, torch.bfloat16: 1e-9}[student.dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=GRAD_RTOL[student.dtype], atol=floor)
    return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_formula(shape, dtype):
    student, teacher, eta, anchor, weight = inputs(shape, dtype)
    check(student, teacher, 1.0)
    check(student, teacher, eta, anchor, weight)


def test_one_launch_after_another():
    """Each begins where the last one ended: a counter that was not back at zero would leave the loss unwritten."""
    for shape in ((3, 4000), (1, 1), (1, 1), (2, 4, 32, 32), (1, 1024), (1, 1025)):
        check(*inputs(shape, torch.float32))


def test_a_launch_after_one_that_was_stopped(monkeypatch):
    """Only the interpreter can be stopped midway, where it leaves a count behind."""
    student, teacher, eta, *_ = inputs((3, 5), torch.float32)

    def stop(*_, **__):
        for counter in fused_guided_mse._counters.values():
            counter.add_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fused_guided_mse, "_guided_mse_kernel", {(3,): stop})
        guided_mse(student, teacher, eta)
    check(student, teacher, eta)


def test_weights_and_anchors_that_are_broadcast():
    student, teacher, _, anchor, weight = inputs((4, 3, 5, 7), torch.float32)
    check(student, teacher, 1.5, anchor[:1, :, :1].expand(4, 3, 5, 7), weight[:1].expand(4))


@pytest.mark.parametrize("with_eta", [False, True])
@pytest.mark.parametrize("with_anchor", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_every_combination_of_options(with_eta, with_anchor, with_weight):
    student, teacher, eta, anchor, weight = inputs((3, 4, 9, 11), torch.float32)
    check(student, teacher, eta if with_eta else 2.0, anchor if with_anchor else None, weight if with_weight else None)


@pytest.mark.parametrize("shape", [(2, 4, 9, 11), (2, 4, 3, 5, 7)], ids=str)
def test_channels_last_is_read_in_place_and_kept(shape):
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    student, teacher, eta, anchor, weight = inputs(shape, torch.float32)
    student = student.detach().contiguous(memory_format=layout).requires_grad_()
    # the teacher and the anchor arrive in other layouts than the student
    assert check(student, teacher, eta, anchor, weight).is_contiguous(memory_format=layout)
    check(student, teacher.contiguous(memory_format=layout), eta)


def test_non_contiguous_inputs():
    student, teacher, eta, anchor, weight = inputs((4, 6, 10, 12), torch.float32)
    student = student.detach()[:, ::2, :, 1::3].requires_grad_()
    check(student, teacher[:, ::2, :, 1::3], eta, anchor[:, ::2, :, 1::3], weight)
    flipped = student.detach().transpose(2, 3).requires_grad_()
    check(flipped, teacher[:, ::2, :, 1::3].transpose(2, 3), eta[:1])


SCALED = {
    "by a number": lambda loss: (loss * 2.0).backward(),
    "by a tensor": lambda loss: (loss * torch.tensor(2.0, device=DEVICE)).backward(),
    "by the gradient": lambda loss: loss.backward(torch.full_like(loss, 2.0)),
    "by a scaler": lambda loss: loss.backward(torch.amp.GradScaler(DEVICE, init_scale=2.0).scale(unit_gradient(loss))),
    "after a unit": lambda loss: (loss * 2.0).backward(unit_gradient(loss)),
    "in a sum": lambda loss: (loss + loss).backward(unit_gradient(loss)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", SCALED.values(), ids=SCALED)
def test_the_chain_rule_holds_when_the_loss_is_scaled(backward, dtype):
    student, teacher, eta, *_ = inputs((3, 5, 7), dtype)
    _, expected = formula(student, teacher, eta)
    backward(guided_mse(student, teacher, eta))
    torch.testing.assert_close(student.grad.double(), 2.0 * expected, rtol=GRAD_RTOL[dtype], atol=1e-7)


def test_gradients_accumulate():
    """Those of one loss are not written to by the backward pass of another."""
    student, teacher, eta, anchor, weight = inputs((3, 5, 7), torch.float32)
    whole = formula(student, teacher, eta)[1] + 3.0 * formula(student, teacher, 2.0, anchor, weight)[1]
    for loss, factor in ((guided_mse(student, teacher, eta), 1.0), (guided_mse(student, teacher, 2.0, anchor, weight), 3.0)):
        loss.backward(torch.amp.GradScaler(DEVICE, init_scale=factor, enabled=factor != 1.0).scale(unit_gradient(loss)))
    torch.testing.assert_close(student.grad.double(), whole, rtol=1e-5, atol=1e-9)


def test_a_unit_gradient_that_was_written_to_is_not_taken_for_one(monkeypatch):
    monkeypatch.setattr(sys.modules[unit_gradient.__module__], "_ones", {})
    student, teacher, eta, *_ = inputs((3, 5, 7), torch.float32)
    loss = guided_mse(student, teacher, eta)
    one = unit_gradient(loss)
    assert one is unit_gradient(guided_mse(student, teacher, 1.0)) and one.item() == 1.0
    loss.backward(one.mul_(4.0))
    torch.testing.assert_close(student.grad.double(), 4.0 * formula(student, teacher, eta)[1], rtol=1e-5, atol=1e-9)


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: the kernels, which do not run here, and PyTorch's operations but for views
    and allocations."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        for name in ("_guided_mse_kernel", "_scale_kernel"):
            monkeypatch.setattr(fused_guided_mse, name, self.stand_in(name))

    def stand_in(self, name):
        def launch(*args, **options):
            self.seen.append(name)

        return collections.defaultdict(lambda: launch)  # whatever the grid

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.__name__:
            self.seen.append(function.__name__)
        return function(*args, **kwargs or {})


BOTH = ["_guided_mse_kernel", "_scale_kernel"]


@pytest.mark.parametrize(
    ("dtype", "scaled", "expected"),
    [
        (torch.float32, False, ["_guided_mse_kernel"]),
        (torch.bfloat16, False, ["_guided_mse_kernel"]),
        (torch.float16, False, BOTH),  # the mean's division, which the stored gradient has no room for
        (torch.bfloat16, True, BOTH),
        (torch.float16, True, BOTH),
    ],
    ids=str,
)
def test_launches_of_loss_and_gradient(dtype, scaled, expected, monkeypatch):
    """At the sizes of latents launching is what takes the time. If the host read something, that would be seen here too."""
    student, teacher, eta, anchor, weight = inputs((4, 4, 64, 64), dtype)
    first = guided_mse(student, teacher, eta)  # the first call on a stream makes its counter
    gradient = torch.ones_like(first) if scaled else unit_gradient(first)
    with Launches(monkeypatch) as launches:
        loss = guided_mse(student, teacher, eta, anchor, weight)
        torch.autograd.grad(loss, student, gradient)
    assert launches.seen == expected


def test_counters_of_streams_and_graphs(monkeypatch):
    """Launches that may overlap never count with the same counter."""
    stream, recording = 7, False
    monkeypatch.setattr(fused_guided_mse, "_counters", {})
    monkeypatch.setattr(fused_guided_mse, "capturing", lambda _: recording)
    monkeypatch.setattr(fused_guided_mse.triton.knobs.runtime, "interpret", False)
    active = types.SimpleNamespace(get_current_stream=lambda _: stream)
    monkeypatch.setattr(fused_guided_mse, "driver", types.SimpleNamespace(active=active))
    device = torch.device(DEVICE, 0)
    on_one = fused_guided_mse._counter(device)
    assert on_one.item() == 0 and fused_guided_mse._counter(device) is on_one
    stream = 8
    assert fused_guided_mse._counter(device) is not on_one
    stream, recording = 7, True  # a graph may be replayed on any stream, and two graphs at once
    in_graph = fused_guided_mse._counter(device)
    assert in_graph is not on_one and fused_guided_mse._counter(device) is not in_graph
    recording = False
    assert fused_guided_mse._counter(device) is on_one


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_second_backward_pass_is_refused(factor):
    """The first one may have scaled the gradient in place, and gave it away."""
    student, teacher, *_ = inputs((3, 5, 7), torch.float32)
    loss = guided_mse(student, teacher, 1.0)
    loss = loss if factor == 1.0 else loss * factor
    loss.backward(unit_gradient(loss), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fp16_gradients_survive_a_large_batch():
    """The mean over 65 x 16384 elements puts them below fp16's smallest number, unless loss scaling reaches them."""
    # 1040 programs: more than the last one adds up at a time
    student, teacher, eta, *_ = inputs((65, 16384), torch.float16)
    expected_loss, expected = formula(student, teacher, eta)
    loss = guided_mse(student, teacher, eta)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0.0)
    (loss * 2.0**20).backward()
    torch.testing.assert_close(student.grad.double(), 2.0**20 * expected, rtol=1e-3, atol=1e-5)


def test_gradient_against_finite_differences():
    """gradcheck in fp64 of the reference, which the kernel is held to above."""
    student, teacher, eta, anchor, weight = (x.detach().double() for x in inputs((2, 3, 4), torch.float32))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: guided_mse_reference(s, teacher, eta, anchor, weight), student)


def test_the_same_bits_every_run():
    student, teacher, eta, anchor, weight = inputs((5, 4, 33, 31), torch.float16)
    runs = []
    for _ in range(3):
        loss = guided_mse(student, teacher, eta, anchor, weight)
        runs.append((loss.detach().clone(), torch.autograd.grad(loss, student)[0]))
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])


def test_whichever_program_is_last(monkeypatch):
    """It adds up the shares of all, in an order that does not depend on which it is."""
    from triton.runtime.interpreter import interpreter_builder as interpreter

    student, teacher, eta, anchor, weight = inputs((5, 4, 33, 31), torch.float32)  # 20 programs
    expected = guided_mse(student, teacher, eta, anchor, weight)
    in_order = type(interpreter).set_grid_idx
    for first in (1, 13, 19):

        def turned(self, x, y, z, first=first):
            in_order(self, (x + first) % self.grid_dim[0], y, z)

        monkeypatch.setattr(type(interpreter), "set_grid_idx", turned)
        assert torch.equal(guided_mse(student, teacher, eta, anchor, weight), expected)


def test_a_perfect_student_has_zero_loss_and_gradient():
    _, teacher, *_ = inputs((3, 4, 5), torch.float32)
    null, concept = teacher.chunk(2)
    student = (null - 2.0 * (concept - null)).requires_grad_()
    loss = guided_mse(student, teacher, 2.0)
    loss.backward()
    assert loss.item() < 1e-12 and student.grad.abs().max() < 1e-6


def test_registered_as_a_torch_op():
    student, teacher, eta, anchor, weight = inputs((2, 4, 9, 11), torch.float32)
    args = (student, teacher, 0.0, eta, anchor, weight)
    torch.library.opcheck(torch.ops.esd_kernels.guided_mse.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiles_into_one_graph_with_its_gradient(backend, layout):
    student, teacher, eta, anchor, weight = inputs((2, 4, 9, 11), torch.float32)
    student = student.detach().contiguous(memory_format=layout).requires_grad_()

    def scaled(student):
        return 2.5 * guided_mse(student * 3.0, teacher, eta, anchor, weight)  # with something before it and after it

    torch.compiler.reset()
    loss = torch.compile(scaled, fullgraph=True, backend=backend)(student)
    (grad,) = torch.autograd.grad(loss, student)
    expected, slope = formula(student.detach() * 3.0, teacher, eta, anchor, weight)
    torch.testing.assert_close(loss.double(), 2.5 * expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), 7.5 * slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": torch.zeros(3, 4)},
        {"anchor": torch.zeros(2, 5)},
        {"eta": torch.zeros(3)},
        {"weight": torch.zeros(2, 1)},
        {"student": torch.zeros(2, 4, dtype=torch.int64)},
        {"student": torch.zeros(0, 4), "teacher": torch.zeros(0, 4)},
    ],
    ids=lambda c: "+".join(c),
)
def test_shapes_that_do_not_fit_are_refused(change):
    good = {"student": torch.zeros(2, 4), "teacher": torch.zeros(4, 4), "eta": 1.0}
    with pytest.raises(ValueError, match=next(iter(change))):
        guided_mse(**(good | change))
