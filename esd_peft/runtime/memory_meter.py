"""Memory use, measured by a dry run on the meta device, whose tensors have sizes and no values."""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BITS = {"nf4": 4 + 32 / 64, "int8": 8}  # of a quantized weight; NF4 has an fp32 scale for every 64 of them


class UnreadValues(TorchDispatchMode):
    """Answers 0 where a value on the meta device is read, which only shortcuts do; none applies."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0
        return function(*args, **kwargs or {})


class MemoryTracker(UnreadValues):
    """Counts the bytes of every tensor that is made while it is entered, from its making to its end.

    What was there before counts nothing; `peak` is the most that there was at a time.
    """

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = before  # kept alive, so that their places are not taken by others
        self._sizes = {t.untyped_storage()._cdata: 0 for t in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(function, types, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@contextlib.contextmanager
def track_memory(*modules: nn.Module, channels_last: bool = False) -> Iterator[MemoryTracker]:
    """Measure memory without the weights of `modules`, and with attention that does not store its matrix.

    PyTorch has fused attention kernels for some devices, and none for the meta device. With `channels_last` the modules have
    the layout of `esd_peft.runtime.devices.place` on a GPU.
    """
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _fused_attention))
        if channels_last:
            stack.enter_context(mock.patch.object(nn.functional, "group_norm", _copying_group_norm))
        yield stack.enter_context(MemoryTracker(weights))


_group_norm = nn.functional.group_norm


def _copying_group_norm(input: Tensor, *args: Any, **options: Any) -> Tensor:
    """PyTorch's GroupNorm on a GPU copies images in channels_last to the layout that it reads, and its result back."""
    _copies = [torch.empty_like(input) for _ in range(2)] if input.dim() == 4 else []  # there until it returns
    return _group_norm(input, *args, **options)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3) for x in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def weight_bytes(module: nn.Module, quantize: str = "none") -> int:
    """Return the size of all parameters and buffers, with the weights of linear layers quantized as `quantize` says."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))
    if quantize == "none":
        return total
    linear = [m.weight for m in module.modules() if type(m) is nn.Linear]
    saved = sum(w.numel() * (w.element_size() - BITS[quantize] / 8) for w in linear)
    largest = max((w.numel() * w.element_size() for w in linear), default=0)  # unpacked, one at a time
    return int(total - saved) + largest
