"""What each phase of a job took: seconds, peak memory, and forward passes of the denoiser."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Costs:
    """Filled in by `phase` and, for the forwards, by whoever runs the denoiser.

    A forward-equivalent is one sample through the denoiser; a backward counts as two of them.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    forward_equivalents: int = 0
    training_tuples: int = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase (again: added on) and keep its peak: device memory on a GPU, resident memory on a CPU."""
        started = time.perf_counter()
        _reset_peak(self.device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), _peak(self.device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: the peak resident size starts anew from the present one


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
