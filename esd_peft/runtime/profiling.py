"""Costs of each phase of a job: seconds and peak memory; and how often each network ran."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from esd_peft.errors import OutOfMemory, out_of_memory
from esd_peft.runtime.devices import is_accelerator, peak_memory, reset_peak_memory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PhaseProfiler:
    """Filled in by `phase`, `nfe` by whoever runs the denoiser, and `calls` by whoever runs any network.

    NFE (number of function evaluations) counts samples that go through the denoiser; a backward pass counts as two.
    """

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    nfe: int = 0
    training_samples: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # samples by "part of the work/kind of call"
    _phase: str | None = None
    _since: float = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Seconds and peak memory (device memory on a GPU, resident memory on a CPU) of the block go to `name`.

        A phase inside another one interrupts it, so the seconds of all phases add up to the whole. Raises `OutOfMemory`
        where the device has too little of it.
        """
        outer = self._phase
        self._switch(name)
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise OutOfMemory(name) from None
        finally:
            self._switch(outer)

    def count(self, part: str, samples: Mapping[str, int]) -> None:
        """Add samples by the kind of call that they went through, as a part of the work (`esd_peft.erasure.flops`)."""
        self.calls.update({f"{part}/{call}": count for call, count in samples.items() if count})

    @contextlib.contextmanager
    def drawing(self, denoiser: nn.Module, call: str, images: int) -> Iterator[None]:
        """Count the `images` of the block, and the samples that go through the denoiser for them, each as one `call`."""

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latents = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list))
            self.count("images", {call: len(latents)})

        hook = denoiser.register_forward_pre_hook(seen, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        self.count("images", {"decoded image": images})

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Forget what the block counts: it does again what was counted before."""
        nfe, calls = self.nfe, Counter(self.calls)
        try:
            yield
        finally:
            self.nfe, self.calls = nfe, calls

    def _switch(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
            self.peak_memory_bytes[self._phase] = max(self.peak_memory_bytes.get(self._phase, 0), _peak(self.device))
        self._phase, self._since = name, now
        _reset_peak(self.device)


def _reset_peak(device: torch.device) -> None:
    if is_accelerator(device):
        reset_peak_memory(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # Linux: the peak resident size starts anew from the present one


def _peak(device: torch.device) -> int:
    if is_accelerator(device):
        return peak_memory(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
