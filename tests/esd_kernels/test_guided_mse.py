"""guided_mse, the kernel itself (on a GPU, or interpreted on the CPU), against the formula in fp64."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esd_kernels import fused_guided_mse, guided_mse, guided_mse_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a gradient is rounded twice, in the kernel's store and in the backward's scaling: half an ulp each;
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
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.dtype == student.dtype
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


def test_the_chain_rule_holds_when_the_loss_is_scaled():
    student, teacher, eta, *_ = inputs((3, 5, 7), torch.float32)
    _, expected = formula(student, teacher, eta)
    (guided_mse(student, teacher, eta) * 2.5).backward()
    torch.testing.assert_close(student.grad.double(), 2.5 * expected, rtol=1e-5, atol=1e-9)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_launches_of_loss_and_gradient(dtype, monkeypatch):
    """At the sizes of latents launching is what takes the time."""
    student, teacher, eta, anchor, weight = inputs((4, 4, 64, 64), dtype)
    from_the_scaler = torch.ones((), device=DEVICE)
    with Launches(monkeypatch) as launches:
        loss = guided_mse(student, teacher, eta, anchor, weight)
        torch.autograd.grad(loss, student, from_the_scaler)
    assert launches.seen == ["_guided_mse_kernel", "sum.default", "_scale_kernel"]


def test_a_second_backward_pass_is_refused():
    """The first one scaled the gradient in place."""
    student, teacher, *_ = inputs((3, 5, 7), torch.float32)
    loss = guided_mse(student, teacher, 1.0) * 2.0
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fp16_gradients_survive_a_large_batch():
    """The mean over 64 x 16384 elements puts them below fp16's smallest number, unless loss scaling reaches them."""
    student, teacher, eta, *_ = inputs((64, 16384), torch.float16)
    _, expected = formula(student, teacher, eta)
    (guided_mse(student, teacher, eta) * 2.0**20).backward()
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
