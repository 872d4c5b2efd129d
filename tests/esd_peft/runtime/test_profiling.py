"""Phases: interrupted ones add up to the whole; peaks belong to the phase that had them."""

import time

import pytest
import torch

from esd_peft.runtime.profiling import Costs


def test_a_phase_inside_another_interrupts_it():
    costs = Costs(torch.device("cpu"))
    started = time.perf_counter()
    with costs.phase("outer"):
        time.sleep(0.05)
        for _ in range(2):
            with costs.phase("inner"):
                time.sleep(0.1)
    whole = time.perf_counter() - started
    assert sum(costs.seconds.values()) == pytest.approx(whole, abs=0.02)
    assert costs.seconds["inner"] >= 0.2
    assert costs.seconds["outer"] < 0.15


def test_peaks_are_per_phase():
    costs = Costs(torch.device("cpu"))
    with costs.phase("small"):
        torch.ones(1000)
    with costs.phase("large"):
        torch.ones(50_000_000)  # 200 MB
    with costs.phase("after"):
        torch.ones(1000)
    peaks = costs.peak_memory_bytes
    assert peaks["large"] - peaks["small"] > 150e6
    assert peaks["large"] - peaks["after"] > 150e6
