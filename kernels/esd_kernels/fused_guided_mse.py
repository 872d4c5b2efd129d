"""`guided_mse` as one Triton kernel: the guided target, its mean squared error and the student's gradient in one pass.

    target = e_anchor − η · (e_concept − e_null)          the paper's eq. 6 has e_anchor = e_null
    loss   = mean over the batch of  weight · mean (student − target)²
    d loss / d student = 2 · weight · (student − target) / (B · n)

Bytes moved for a sample of n elements: student, both teacher halves and the anchor are read once, the
gradient is written once, in the student's dtype. The eager formula writes and reads the target and the difference besides.
Launches: one forward, in which the last program to finish adds up the shares of all. Backward none where the incoming
gradient is known to be one (`unit_gradient`), and otherwise one, which scales the stored gradient in place and touches it
only if the factor is not one: that is decided on the device.

Why the last program sees what the others wrote, in the terms of the memory models of PTX and of HSA. A program stores its
share and then adds one to a counter, with acquire-release semantics at the scope of the device. One thread does both,
because a store and an addition of a single number are its first thread's, so the addition releases the share. All
additions to the counter form one chain, so the one that finds the counter at the number of the other programs
synchronises with each of theirs and acquires every share. The threads that then load the shares did not add themselves:
the result of the addition reaches them through shared memory and a barrier, which carries the order on to them. Which
program is the last differs from run to run, but each would add the shares in the order of their numbers, so the sum has
the same bits every run. `tests/esd_kernels/test_ahead_of_time.py` looks for all of this in the compiled code.

The last program sets the counter back to zero. Nobody else reads it by then, and the next launch on the same stream begins
after this one has ended, so it finds a zero without a launch that clears it. Launches on two streams may overlap,
so each stream has a counter of its own (`_counter`).
"""

import contextlib
import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from esd_kernels.unit_gradient import capturing, is_unit_gradient

BLOCK = 1024  # elements a program
# 128 threads on NVIDIA's GPUs and on AMD's, whose warps are twice as wide: a thread then has 8 elements, which are one
# 128-bit load in half precision and two in fp32
WARPS = 2 if torch.version.hip else 4
# named, because Triton's default for it changes with 3.10, and bits with it
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


# The batch is told by the number of programs, so one of 1 or 16 runs the code of any other, instead of being compiled anew
# when the last batch of a run comes.
@triton.jit
def _guided_mse_kernel(  # type: ignore[no-untyped-def]
    student_ptr,  # [B, n], prediction of the model that learns
    teacher_ptr,  # [2B, n], the null half first
    anchor_ptr,  # [B, n], or none: e_null is the anchor
    etas_ptr,  # [B] fp32, or none: `eta` holds for the whole batch
    weight_ptr,  # [B] fp32, or none: one for every sample
    slope_ptr,  # [B, n], d loss / d student, divided by `_unit`
    partial_ptr,  # [B * blocks] fp32, each program's share of the loss
    loss_ptr,  # [] fp32
    counter_ptr,  # [] int32, programs that have stored their share; zero before and after
    eta,
    scale,  # 1 / (B * n)
    slope_scale,  # 2 / (B * n), divided by `_unit`
    n,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(n, BLOCK)
    batch = programs // blocks
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    here = row * n + column
    # to fp32 right after every load: sums in fp32, and bf16 arithmetic is wrong under the interpreter
    student = tl.load(student_ptr + here, mask=mask, other=0.0).to(tl.float32)
    null = tl.load(teacher_ptr + here, mask=mask, other=0.0).to(tl.float32)
    concept = tl.load(teacher_ptr + (row + batch) * n + column, mask=mask, other=0.0).to(tl.float32)
    anchor = null
    if anchor_ptr is not None:
        anchor = tl.load(anchor_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if etas_ptr is not None:
        eta = tl.load(etas_ptr + row)
    error = student - (anchor - eta * (concept - null))
    weighted = error
    if weight_ptr is not None:
        weighted = error * tl.load(weight_ptr + row)
    tl.store(slope_ptr + here, (slope_scale * weighted).to(slope_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program, scale * tl.sum(weighted * error, axis=0))
    # the last program adds up the shares; see the module's docstring for why all are visible to it
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        shares: tl.constexpr = BLOCK // 8  # at a time, in registers that the rest has taken: more at a time would take more
        total = tl.zeros([shares], dtype=tl.float32)
        first = 0
        while first < programs:  # the interpreter of Triton 3.5 has no range over a number of the device's
            share = first + tl.arange(0, shares)
            total += tl.load(partial_ptr + share, mask=share < programs, other=0.0)
            first += shares
        tl.store(loss_ptr, tl.sum(total, axis=0))
        tl.store(counter_ptr, 0)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, unit, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = tl.load(factor_ptr) * unit  # [] fp32
    if factor != 1.0:  # tested here: the host would have to wait for the device
        here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = here < n
        x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + here, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def launch(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss `[]` fp32, and its gradient divided by `_unit`; every input dense, with the batch outermost."""
    batch, n = len(student), student.numel() // len(student)
    programs = batch * -(-n // BLOCK)
    slope = torch.empty_like(student)
    partial = student.new_empty(programs, dtype=torch.float32)
    loss = student.new_empty((), dtype=torch.float32)
    try:
        with _on(student.device):
            _guided_mse_kernel[(programs,)](
                student,
                teacher,
                anchor,
                etas,
                weight,
                slope,
                partial,
                loss,
                _counter(student.device),
                eta,
                1.0 / student.numel(),
                2.0 / student.numel() / _unit(student),
                n,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    except BaseException:
        _counters.clear()  # interpreted programs may have been stopped midway
        raise
    return loss, slope


def launch_scaling(slope: Tensor, factor: Tensor, unit: float) -> None:
    """Multiply `slope` in place by `factor` `[]` fp32 and `unit`."""
    with _on(slope.device):
        _scale_kernel[(-(-slope.numel() // BLOCK),)](slope, factor, unit, slope.numel(), BLOCK=BLOCK, **OPTIONS)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """A zero, `[]` int32, that no other launch uses while this one does: of each stream its own, whose launches wait for
    each other, and which the kernel leaves at zero.

    A graph that is being captured may be replayed on any stream, so it gets counters of its own, cleared by each replay."""
    if capturing(device):
        return torch.zeros((), dtype=torch.int32, device=device)
    # the interpreter completes a launch before it returns, on CPU tensors or on those that a test declares as others
    key = device, 0 if triton.knobs.runtime.interpret else driver.active.get_current_stream(device.index)
    if key not in _counters:
        _counters[key] = torch.zeros((), dtype=torch.int32, device=device)
    return _counters[key]


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever device its arguments are on."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


def _unit(student: Tensor) -> float:
    """Return the divisor of the stored gradient: the mean's 1 / (B * n) where it would underflow."""
    return 1.0 / student.numel() if student.dtype == torch.float16 else 1.0


class FusedGuidedMSE(torch.autograd.Function):
    """The eager way in: half of the host time that a custom op takes (kernels/README.md)."""

    @staticmethod
    def forward(ctx, student, *rest):  # type: ignore[no-untyped-def]
        loss, slope = launch(student, *rest)
        ctx.save_for_backward(slope)
        ctx.unit = _unit(student)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):  # type: ignore[no-untyped-def]
        (slope,) = ctx.saved_tensors
        if ctx.unit != 1.0 or not is_unit_gradient(grad_loss):
            launch_scaling(slope, grad_loss, ctx.unit)
        # the gradient is now the caller's, who may keep it: a second backward pass, which may scale it, is refused
        torch.autograd.graph.increment_version(slope)
        return slope, None, None, None, None, None


@torch.library.custom_op("esd_kernels::guided_mse", mutates_args=())
def fused_op(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`launch` as one operation that `torch.compile` sees; its gradient is arithmetic, fused with what follows it."""
    return launch(student, teacher, eta, etas, anchor, weight)


@fused_op.register_fake
def _fused_op_fake(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), torch.empty_like(student)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.unit = _unit(inputs[0])


def _op_backward(ctx, grad_loss: Tensor, _grad_of_slope: Tensor | None):  # type: ignore[no-untyped-def]
    (slope,) = ctx.saved_tensors
    return (slope * (grad_loss * ctx.unit)).to(slope.dtype), None, None, None, None, None


fused_op.register_autograd(_op_backward, setup_context=_setup_context)


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Return whether Triton works on `device`: it needs a C compiler, and a supported GPU. Warns once otherwise."""
    try:
        launch_scaling(torch.zeros(1, device=device), torch.ones((), device=device), 1.0)
    except Exception as error:  # each backend fails in its own way
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"guided_mse runs as plain PyTorch on {device}: Triton does not work there ({reason})", stacklevel=2)
        return False
    return True
