"""Phases: interrupted ones add up to the whole; peaks belong to the phase that had them."""

import time

import pytest
import torch

from esd_peft.runtime.profiling import PhaseProfiler


def test_a_phase_inside_another_interrupts_it():
    profiler = PhaseProfiler(torch.device("cpu"))
    started = time.perf_counter()
    with profiler.phase("outer"):
        time.sleep(0.05)
        for _ in range(2):
            with profiler.phase("inner"):
                time.sleep(0.1)
    whole = time.perf_counter() - started
    assert sum(profiler.seconds.values()) == pytest.approx(whole, abs=0.02)
    assert profiler.seconds["inner"] >= 0.2
    assert profiler.seconds["outer"] < 0.15


def test_peaks_are_per_phase():
    profiler = PhaseProfiler(torch.device("cpu"))
    with profiler.phase("small"):
        torch.ones(1000)
    with profiler.phase("large"):
        torch.ones(50_000_000)  # 200 MB
    with profiler.phase("after"):
        torch.ones(1000)
    peaks = profiler.peak_memory_bytes
    assert peaks["large"] - peaks["small"] > 150e6
    assert peaks["large"] - peaks["after"] > 150e6
