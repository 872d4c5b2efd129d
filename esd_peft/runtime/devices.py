"""Devices and dtypes of a job, and asynchronous copies of tensors."""

import contextlib
import gc
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.runtime import distributed

ACCELERATORS = ("cuda", "xpu", "mps")  # PyTorch calls AMD's GPUs (ROCm) cuda
TRITON = ("cuda", "xpu")  # supported by Triton, torch.compile, and several processes
IMAGINED = "cuda"  # the device of memory plans without a GPU
CHOICES = "use auto, cpu, cuda (ROCm too), xpu or mps"


def is_accelerator(device: torch.device) -> bool:
    """Return whether it is a GPU of any kind."""
    return device.type in ACCELERATORS


def has_triton(device: torch.device) -> bool:
    """Return whether Triton and torch.compile support it."""
    return device.type in TRITON


def has_bitsandbytes(device: torch.device) -> bool:
    """Return whether bitsandbytes has kernels for it."""
    return device.type != "mps"


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names; auto: a GPU, where there is one. Raises `UserError` if this machine does not have
    it."""
    if name == "auto":
        name = next((kind for kind in ACCELERATORS if _count(kind)), "cpu")
    name = distributed.own_device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; {CHOICES}") from None
    if device.type != "cpu" and not is_accelerator(device):
        raise UserError(f"--device {name} is not supported; {CHOICES}")
    if is_accelerator(device) and (device.index or 0) >= _count(device.type):
        seen = f"{_count(device.type)} {device.type.upper()} devices"
        raise UserError(f"--device {name} is not there: PyTorch sees {seen}; use cpu")
    return device


def _count(kind: str) -> int:
    """Return the number of devices of that kind."""
    module = _of(kind)
    return module.device_count() if module.is_available() else 0


def _of(kind: str) -> Any:
    """PyTorch's module for that kind of device."""
    return torch.get_device_module(kind)


def describe_device(device: torch.device) -> str:
    """Return its name, for records; a CPU has its number of threads."""
    if device.type == "mps":
        return "Apple GPU"
    return _of(device.type).get_device_name(device) if is_accelerator(device) else f"CPU, {torch.get_num_threads()} threads"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `--dtype` names; auto: bfloat16 (float16 on older GPUs), on a CPU float32.

    Raises `UserError` if the device cannot compute in it.
    """
    with current(device):  # which may be another one than the first
        native_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if native_bf16 else torch.float16
    if name == "bfloat16" and not native_bf16:
        raise UserError(f"--dtype bfloat16 is not there on {describe_device(device)}; use float16")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def memory_info(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and bytes in all: of a GPU its own, of a CPU the host's."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    if not is_accelerator(device):
        return psutil.virtual_memory().available, psutil.virtual_memory().total
    free, total = _of(device.type).mem_get_info(device)
    return free, total


def usable_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, including memory that PyTorch has cached for this process."""
    free, _ = memory_info(device)
    if device.type == "mps":
        return free + torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory()
    return free + int(_of(device.type).memory_reserved(device) - _of(device.type).memory_allocated(device))


def reset_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory`; Apple's GPUs have no such counter."""
    if device.type != "mps":
        _of(device.type).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes of a GPU that PyTorch has held since; of an Apple GPU those that it holds now."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return int(_of(device.type).max_memory_reserved(device))


def exact(x: Tensor) -> Tensor:
    """`x` where there is fp64, and where matrices are decomposed: Apple's GPUs do neither."""
    return x.cpu() if x.device.type == "mps" else x


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current device of libraries that use one: Triton, bitsandbytes, pinned memory."""
    return _of(device.type).device(device) if has_triton(device) else contextlib.nullcontext()


def place(denoiser: nn.Module, device: torch.device) -> None:
    """Move it there in place; on a GPU convolutions become channels_last, the layout that tensor cores read.

    Saved files do not show it. On a CPU it gains too little to be worth other bits.
    """
    if is_accelerator(device):
        denoiser.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        denoiser.to(device)


def release(device: torch.device) -> None:
    """Give back the memory of what nothing points to any more."""
    gc.collect()  # hooks and tracebacks leave references in circles
    if is_accelerator(device):
        _of(device.type).empty_cache()


def graphed(module: nn.Module, sample: tuple[Tensor, ...]) -> None:
    """Make `module` replay a CUDA graph for tensors like `sample`, in place, on devices with CUDA graphs."""
    if sample[0].is_cuda:
        torch.cuda.make_graphed_callables(module, sample)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy `x` to `device` without waiting for its pending work.

    To a GPU with memory of its own it goes through pinned memory: a copy from ordinary memory would first let the GPU
    finish everything.
    """
    if has_triton(device) and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def fetch(x: Tensor) -> Tensor:
    """`x` in host memory (pinned, if it comes from a GPU), without waiting: not to be read before `finish`."""
    return x.to("cpu", non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was told to do."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif is_accelerator(device):
        _of(device.type).synchronize(device)
