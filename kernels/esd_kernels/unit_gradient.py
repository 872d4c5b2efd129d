"""The gradient that a backward pass begins with: a one that is kept, so that nobody makes it anew, and it is known again."""

import torch
from torch import Tensor

_ones: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def unit_gradient(loss: Tensor) -> Tensor:
    """A one like `loss` `[]`, and the same tensor each time, for `loss.backward(unit_gradient(loss))`.

    This computes what `loss.backward()` does, without the launch that makes a one. The backward pass of `guided_mse` also
    knows this tensor, where it gets it as it is, and then launches nothing. With a `GradScaler` the line is
    `loss.backward(scaler.scale(unit_gradient(loss)))`: one multiplication instead of one forward and one backward. Do not
    write to it.
    """
    if type(loss) is not Tensor:  # a fake tensor, or another kind that only its own mode understands
        return torch.ones_like(loss)
    key = loss.device, loss.dtype
    if key not in _ones:
        one = torch.ones_like(loss)
        if capturing(loss.device):  # its value comes with the graph's first replay, too late for others
            return one
        _ones[key] = one
    return _ones[key]


def is_unit_gradient(grad: Tensor) -> bool:
    """Return whether `grad` is that very tensor, unchanged. It reads no values: that would wait for the device."""
    return grad is _ones.get((grad.device, grad.dtype)) and grad._version == 0


def capturing(device: torch.device) -> bool:
    """Return whether launches on `device` are now captured into a graph."""
    if device.type == "cuda":
        return torch.cuda.is_current_stream_capturing()
    known = device.type == "xpu" and hasattr(torch.xpu, "is_current_stream_capturing")  # PyTorch 2.9 has no such graphs
    return known and torch.xpu.is_current_stream_capturing()
