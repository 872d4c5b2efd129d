"""Where and in which number format a job computes, and how tensors get there and back without waiting."""

import contextlib
import gc

import torch
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.runtime import distributed


def resolve_device(name: str) -> torch.device:
    """The device that `--device` names. Raises `UserError` if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = distributed.own_device(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def describe_device(device: torch.device) -> str:
    """Its name, for records of what ran where; of a CPU how many threads compute."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number format that `--dtype` names; auto: bfloat16 (float16 on older GPUs), on a CPU float32.

    Raises `UserError` if the device cannot compute in it.
    """
    with current(device):  # which may be another one than the first
        native_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if native_bf16 else torch.float16
    if name == "bfloat16" and not native_bf16:
        raise UserError(f"--dtype bfloat16 is not there on {torch.cuda.get_device_name(device)}; use float16")
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within it `device` is what libraries take that ask for the current one: Triton, bitsandbytes, pinned memory."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def place(denoiser: nn.Module, device: torch.device) -> None:
    """Move it there in place; on a GPU convolutions become channels_last, the layout that tensor cores read.

    Saved files do not show it. On a CPU it gains too little to be worth other bits.
    """
    if device.type == "cuda":
        denoiser.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    else:
        denoiser.to(device)


def release(device: torch.device) -> None:
    """Give back the memory of what nothing points to any more."""
    gc.collect()  # hooks and tracebacks leave references in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def send(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`, without waiting for what the device still has to do.

    To a GPU it goes through pinned memory: a copy from ordinary memory would first let the GPU finish everything.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def fetch(x: Tensor) -> Tensor:
    """`x` in host memory (pinned, if it comes from a GPU), without waiting: not to be read before `finish`."""
    return x.to("cpu", non_blocking=True)


def finish(device: torch.device) -> None:
    """Wait until the device has done all it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
