"""The guided target of ESD and its mean squared error, with the student's gradient, in one pass.

    target = e_anchor − η · (e_concept − e_null)          the paper's eq. 6 has e_anchor = e_null
    loss   = mean over the batch of  weight · mean (student − target)²

Bytes moved for a sample of n elements: student, both teacher halves and the anchor are read once, the
gradient is written once. The eager formula writes and reads the target and the difference besides. The backward pass
scales the gradient in place, and touches it only if there is something to scale by: that is decided on the device.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program: 4 a thread at 4 warps and 2 vectors in flight


@triton.jit
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
    concept = tl.load(teacher_ptr + batch.to(tl.int64) * n + here, mask=mask, other=0.0).to(tl.float32)
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
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    factor = tl.load(factor_ptr)  # [] fp32
    if factor != 1.0:  # asked here, not on the host, which would have to wait for the device
        here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = here < n
        x = tl.load(x_ptr + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_ptr + here, (x * factor).to(x_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("esd_kernels::guided_mse", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss `[]` fp32, and its gradient divided by `_unit`; every input dense, with the batch outermost."""
    batch, n = len(student), student[0].numel()
    blocks = triton.cdiv(n, BLOCK)
    slope = torch.empty_like(student)
    partial = torch.empty(batch * blocks, dtype=torch.float32, device=student.device)
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
    )
    return partial.sum(), slope  # a tree sum over a fixed order, no atomics: the same bits every run


@_forward.register_fake
def _forward_fake(
    student: Tensor, teacher: Tensor, eta: float, etas: Tensor | None, anchor: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), torch.empty_like(student)


def _unit(student: Tensor) -> float:
    """What the stored gradient is divided by: the mean's 1 / (B * n), where it would push it below the smallest number."""
    return 1.0 / student.numel() if student.dtype == torch.float16 else 1.0


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.unit = _unit(inputs[0])


def _backward(ctx, grad_loss: Tensor, _grad_of_slope: Tensor | None):  # type: ignore[no-untyped-def]
    slope, factor = ctx.saved_tensors[0], grad_loss * ctx.unit
    if type(slope) is Tensor:
        _scale_kernel[(triton.cdiv(slope.numel(), BLOCK),)](slope, factor, slope.numel(), BLOCK=BLOCK)
        torch.autograd.graph.increment_version(slope)  # a second backward pass must not scale it again: it is refused
    else:  # traced by a compiler, which fuses this with what follows
        slope = (slope * factor).to(slope.dtype)
    return slope, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def guided_mse(
    student: Tensor,
    teacher: Tensor,
    eta: float | Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error between the student's prediction and the guided target (ESD, arXiv 2303.07345, eq. 6).

    `target = anchor − eta · (e_concept − e_null)`, with `e_null` for the anchor where none is given. The
    authors' current scripts use `e_concept` as their anchor, so their η = 2 is η = 1 here.

    Args:
        student: `[B, ...]`, fp32, fp16 or bf16; the only input that gets a gradient.
        teacher: `[2B, ...]`, the null half first, as classifier-free guidance batches it.
        eta: one number, or `[B]`.
        anchor: `[B, ...]` or none.
        weight: `[B]` or none (1 for every sample); not normalised.

    Returns:
        The loss, `[]` fp32; sums are taken in fp32 and in a fixed order.

    On a CUDA device (and under `TRITON_INTERPRET=1`) the fused kernel runs; elsewhere `guided_mse_reference`.
    Contiguous and channels_last inputs are read in place, others are copied first. The gradient is
    computed in the forward pass and stored in the student's dtype, before the mean's division and any loss scaling.

    Raises:
        ValueError: the shapes do not fit together, or an input is not floating point.
    """
    _check(student, teacher, eta, anchor, weight)
    if not (student.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return guided_mse_reference(student, teacher, eta, anchor, weight)
    layout = _layout(student)
    loss, _ = torch.ops.esd_kernels.guided_mse(
        student.contiguous(memory_format=layout),
        teacher.detach().contiguous(memory_format=layout),
        0.0 if isinstance(eta, Tensor) else float(eta),
        _per_sample(eta, student) if isinstance(eta, Tensor) else None,
        None if anchor is None else anchor.detach().contiguous(memory_format=layout),
        None if weight is None else _per_sample(weight, student),
    )
    return loss


def guided_mse_reference(
    student: Tensor,
    teacher: Tensor,
    eta: float | Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The formula of `guided_mse` in plain PyTorch, in fp32 (fp64 for fp64 inputs)."""
    _check(student, teacher, eta, anchor, weight)
    wide = torch.promote_types(student.dtype, torch.float32)
    per_sample = (-1, *(1,) * (student.dim() - 1))
    null, concept = teacher.detach().to(wide).chunk(2)
    if isinstance(eta, Tensor):
        eta = eta.to(student.device, wide).expand(len(student)).reshape(per_sample)
    target = (null if anchor is None else anchor.detach().to(wide)) - eta * (concept - null)
    error = (student.to(wide) - target).square()
    if weight is not None:
        error = error * weight.to(student.device, wide).reshape(per_sample)
    return error.mean()


def _check(student: Tensor, teacher: Tensor, eta: float | Tensor, anchor: Tensor | None, weight: Tensor | None) -> None:
    if student.numel() == 0 or student.dim() < 1 or not student.is_floating_point():
        raise ValueError(f"student must be a non-empty floating point [B, ...], not {student.dtype} {[*student.shape]}")
    if teacher.shape != (2 * len(student), *student.shape[1:]):
        raise ValueError(f"teacher must be [2B, ...] for a student of {[*student.shape]}, not {[*teacher.shape]}")
    if anchor is not None and anchor.shape != student.shape:
        raise ValueError(f"anchor must have the student's shape {[*student.shape]}, not {[*anchor.shape]}")
    if isinstance(eta, Tensor) and eta.numel() != 1 and eta.shape != student.shape[:1]:
        raise ValueError(f"eta must be a number or [{len(student)}], not {[*eta.shape]}")
    if weight is not None and weight.shape != student.shape[:1]:
        raise ValueError(f"weight must be [{len(student)}], not {[*weight.shape]}")


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format `x` is dense in; channels_last keeps each sample in one piece too."""
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _per_sample(value: Tensor, student: Tensor) -> Tensor:
    return value.detach().to(student.device, torch.float32).expand(len(student)).contiguous()
