"""`guided_mse` as one Triton kernel: the guided target, its mean squared error and the student's gradient in one pass.

    target = e_anchor − η · (e_concept − e_null)          the paper's eq. 6 has e_anchor = e_null
    loss   = mean over the batch of  weight · mean (student − target)²
    d loss / d student = 2 · weight · (student − target) / (B · n)

Bytes moved for a sample of n elements: student, both teacher halves and the anchor are read once, the
gradient is written once. The eager formula writes and reads the target and the difference besides. The backward pass
scales the gradient in place, and touches it only if there is something to scale by: that is decided on the device.
Launches: two forward (the kernel, the sum of the programs' shares) and one backward.
"""

import contextlib
import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program
# 128 threads on NVIDIA's GPUs and on AMD's, whose warps are twice as wide: a thread then has 8 elements, which are one
# 128-bit load in half precision and two in fp32
WARPS = 2 if torch.version.hip else 4
# named, because Triton's default for it changes with 3.10, and bits with it
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


# The sizes of a batch are not specialised: a batch of 1 (which would be compiled as the constant 1) and one of 16 run
# the code of any other, instead of being compiled anew when the last batch of a run comes.
@triton.jit(do_not_specialize=["batch", "blocks"])
def _guided_mse_kernel(  # type: ignore[no-untyped-def]
    student_ptr,  # [B, n], prediction of the model that learns
    teacher_ptr,  # [2B, n], the null half first
    anchor_ptr,  # [B, n], read only if HAS_ANCHOR
    eta_ptr,  # [B] fp32, read only if HAS_ETA
    weight_ptr,  # [B] fp32, read only if HAS_WEIGHT
    slope_ptr,  # [B, n], d loss / d student, divided by `unit`
    partial_ptr,  # [B * blocks] fp32, each program's share of the loss
    eta,  # fp32, for the whole batch unless HAS_ETA
    scale,  # 1 / (B * n)
    unit,  # 1, or scale where the gradient's dtype could not hold it
    batch,
    n,
    blocks,
    HAS_ANCHOR: tl.constexpr,
    HAS_ETA: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    here = row * n + column
    # to fp32 right after every load: sums in fp32, and bf16 arithmetic is wrong under the interpreter
    student = tl.load(student_ptr + here, mask=mask, other=0.0).to(tl.float32)
    null = tl.load(teacher_ptr + here, mask=mask, other=0.0).to(tl.float32)
    concept = tl.load(teacher_ptr + (row + batch) * n + column, mask=mask, other=0.0).to(tl.float32)
    anchor = null
    if HAS_ANCHOR:
        anchor = tl.load(anchor_ptr + here, mask=mask, other=0.0).to(tl.float32)
    if HAS_ETA:
        eta = tl.load(eta_ptr + row)
    error = student - (anchor - eta * (concept - null))
    weighted = error
    if HAS_WEIGHT:
        weighted = error * tl.load(weight_ptr + row)
    tl.store(slope_ptr + here, (2.0 * scale / unit * weighted).to(slope_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program, scale * tl.sum(weighted * error, axis=0))


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, unit, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = tl.load(factor_ptr) * unit  # [] fp32
    if factor != 1.0:  # asked here, not on the host, which would have to wait for the device
        here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = here < n
        x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + here, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


def launch(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss `[]` fp32, and its gradient divided by `_unit`; every input dense, with the batch outermost."""
    batch, n = len(student), student[0].numel()
    blocks = triton.cdiv(n, BLOCK)
    slope = torch.empty_like(student)
    partial = torch.empty(batch * blocks, dtype=torch.float32, device=student.device)
    with _on(student.device):
        _guided_mse_kernel[(batch * blocks,)](
            student,
            teacher,
            student if anchor is None else anchor,
            partial if etas is None else etas,
            partial if weight is None else weight,
            slope,
            partial,
            eta,
            1.0 / (batch * n),
            _unit(student),
            batch,
            n,
            blocks,
            HAS_ANCHOR=anchor is not None,
            HAS_ETA=etas is not None,
            HAS_WEIGHT=weight is not None,
            BLOCK=BLOCK,
            **OPTIONS,
        )
    return partial.sum(), slope  # a tree sum over a fixed order, no atomics: the same bits every run


def launch_scaling(slope: Tensor, factor: Tensor, unit: float) -> None:
    """Multiply `slope` in place by `factor` `[]` fp32 and `unit`."""
    with _on(slope.device):
        _scale_kernel[(triton.cdiv(slope.numel(), BLOCK),)](slope, factor, unit, slope.numel(), BLOCK=BLOCK, **OPTIONS)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever device its arguments are on."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


def _unit(student: Tensor) -> float:
    """What the stored gradient is divided by: the mean's 1 / (B * n), where it would push it below the smallest number."""
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
        launch_scaling(slope, grad_loss, ctx.unit)
        torch.autograd.graph.increment_version(slope)  # a second backward pass must not scale it again: it is refused
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
    """Whether Triton works on `device`: it needs a C compiler, and a GPU that it knows. Warns once where it does not."""
    try:
        launch_scaling(torch.zeros(1, device=device), torch.ones((), device=device), 1.0)
    except Exception as error:  # each backend fails in its own way
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"guided_mse runs as plain PyTorch on {device}: Triton does not work there ({reason})", stacklevel=2)
        return False
    return True
