"""The guided target of ESD and its mean squared error: the fused kernel where Triton is, and the plain formula."""

import functools
import os
import warnings

import torch
from torch import Tensor

try:
    from esd_kernels import fused_guided_mse as fused
except ImportError as error:  # Triton has no build for this platform (Windows, macOS)
    if error.name != "triton":
        raise
    fused = None  # type: ignore[assignment]


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

    On a CUDA device (and under `TRITON_INTERPRET=1`) the fused kernel runs; elsewhere, and with a warning where Triton is
    missing or finds no C compiler, `guided_mse_reference`.
    Contiguous and channels_last inputs are read in place, others are copied first. The gradient is
    computed in the forward pass and stored in the student's dtype, before the mean's division and any loss scaling.

    Raises:
        ValueError: the shapes do not fit together, or an input is not floating point.
    """
    _check(student, teacher, eta, anchor, weight)
    if not _fuses(student):
        return guided_mse_reference(student, teacher, eta, anchor, weight)
    layout = _layout(student)
    inputs = (
        student.contiguous(memory_format=layout),
        teacher.detach().contiguous(memory_format=layout),
        0.0 if isinstance(eta, Tensor) else float(eta),
        _per_sample(eta, student) if isinstance(eta, Tensor) else None,
        None if anchor is None else anchor.detach().contiguous(memory_format=layout),
        None if weight is None else _per_sample(weight, student),
    )
    if _traced(student):
        return torch.ops.esd_kernels.guided_mse(*inputs)[0]
    return fused.FusedGuidedMSE.apply(*inputs)  # type: ignore[no-untyped-call]


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


def _fuses(student: Tensor) -> bool:
    """Return whether the kernel runs for `student`: on a GPU, or interpreted."""
    if not (student.is_cuda or student.is_xpu):
        return fused is not None and os.environ.get("TRITON_INTERPRET") == "1"
    if fused is None:
        _say_that_triton_is_missing()
        return False
    return _traced(student) or fused.can_launch(student.device)


def _traced(student: Tensor) -> bool:
    """Return whether a compiler traces, or a tensor has no data: both need a registered operation."""
    return torch.compiler.is_compiling() or isinstance(student, torch._subclasses.FakeTensor)


@functools.cache
def _say_that_triton_is_missing() -> None:
    warnings.warn("guided_mse runs as plain PyTorch: triton is not installed", stacklevel=3)


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
