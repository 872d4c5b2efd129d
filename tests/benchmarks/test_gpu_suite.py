"""The GPU suite and the kernel timings run to the end where there is no GPU, and say what they left out."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these take minutes: run them by hand")


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sections_that_need_a_gpu_are_skipped(tmp_path):
    said = run("gpu_suite.py", "--output", str(tmp_path))
    assert "correctness: done" in said and "memory: skipped: no GPU" in said
    found = json.loads((tmp_path / "cpu" / "correctness.json").read_text())
    assert set(found["worst_relative_error"]) == {"fp32", "fp16", "bf16"}
    assert (tmp_path / "cpu" / "summary.md").is_file() and not (tmp_path / "cpu" / "memory.json").exists()


def test_our_steps_are_timed_as_the_suite_times_them(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    suite = importlib.import_module("gpu_suite")
    options = {"trajectories": 2, "num_inference_steps": 2, "train_batch_size": 2, "max_train_steps": 2, "device": "cpu"}
    found = suite._our_steps(None, options)
    assert set(found) == {"rollout_step_s", "training_step_s"} and all(0 < v < 10 for v in found.values())


def test_timings_run_once_each(tmp_path):
    run("kernel_timings.py", "--output", str(tmp_path / "timings"))
    with (tmp_path / "timings.csv").open() as file:
        assert {row["implementation"] for row in csv.DictReader(file)} == {"kernel", "eager"}
