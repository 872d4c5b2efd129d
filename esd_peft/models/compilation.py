"""`--compile`: the denoiser's blocks through `torch.compile`, while the buffer is filled and the student trained."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esd_peft.errors import UserError, one_line
from esd_peft.runtime.devices import has_triton

AUTO_CALLS = 2000  # calls of the denoiser from which `auto` compiles: a guess, not measured yet
GRAPHS = 128  # compiled versions of a block: its widths times teacher, training and student; PyTorch gives up beyond


def check_compiler(compile: str, device: torch.device) -> None:
    """Raises `UserError` for `--compile on` where this machine cannot compile."""
    if compile == "on" and (obstacle := _obstacle(device)):
        raise UserError(f"--compile on does not work on this machine ({obstacle}); use auto or off")


@contextlib.contextmanager
def compiled(denoiser: ModelMixin, compile: str, calls: int, device: torch.device) -> Iterator[None]:
    """Compile the denoiser's blocks within the block: with `compile` "on"; with "auto" if it pays for so many `calls` and
    works.

    It compiles blocks, and not the whole denoiser: a few kinds of block repeat many times, so there is less to compile, and
    switching an adapter recompiles only its own blocks. The batch size is symbolic from the start: rollouts and training
    differ in it, and neither of them recompiles.
    """
    compiles = compile == "on"
    if compile == "auto" and has_triton(device) and calls >= AUTO_CALLS:
        obstacle = _obstacle(device)
        compiles = obstacle is None
        if obstacle:
            print(f"note: nothing is compiled, because this machine cannot ({obstacle})", file=sys.stderr)
    if not compiles:
        yield
        return
    blocks = repeated_blocks(denoiser)
    # auto falls back to eager if compilation fails; "on" raises
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, suppress_errors=compile == "auto"):
        for block in blocks:
            block.forward = _with_any_batch(torch.compile(block.forward))
        try:
            yield
        finally:
            for block in blocks:
                del block.forward


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """The blocks that diffusers keeps on one device each, the innermost of them: for a UNet its transformer blocks and
    residual blocks, for a transformer its blocks. A denoiser that names none is one block."""
    kinds = getattr(denoiser, "_no_split_modules", None) or []
    named = [module for module in denoiser.modules() if type(module).__name__ in kinds]
    return [m for m in named if not any(n is not m and n in set(m.modules()) for n in named)] or [denoiser]


def _with_any_batch(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` with the first dimension of its tensors marked as one that changes."""

    @functools.wraps(forward)
    def run(*args: object, **kwargs: object) -> Tensor:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.dim():
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return forward(*args, **kwargs)

    return run


def _obstacle(device: torch.device) -> str | None:
    """Why nothing can be compiled for `device`, if it cannot: for want of a C++ compiler or of Triton, for example."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:  # each backend fails in its own way
        return one_line(error)
    return None
