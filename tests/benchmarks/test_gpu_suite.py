"""The GPU suite and the kernel timings run to the end where there is no GPU, and say what they left out."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU these take minutes: run them by hand")


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__file__, *arguments])
    script.main()


def test_what_needs_a_gpu_is_skipped_and_each_row_stands_by_itself(suite, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, suite, "--output", str(tmp_path))
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "correctness, bf16: done" in said and "memory, FLUX.1: skipped: no GPU" in said
    found = json.loads((tmp_path / "cpu" / "correctness.json").read_text())
    assert set(found) == {"fp32", "fp16", "bf16"} and found["bf16"]["worst_relative_error"]["loss"] < 1e-5
    assert (tmp_path / "cpu" / "summary.md").is_file() and not (tmp_path / "cpu" / "memory.json").exists()


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_suite")


def test_a_row_that_fails_loses_nothing_else(suite, tmp_path, monkeypatch):
    def fail():
        assert json.loads(file.read_text()) == {"first": 1}, "what was measured before is written already"
        raise RuntimeError("CUDA error:\nan illegal memory access")

    file = tmp_path / "memory.json"
    monkeypatch.setitem(suite.SECTIONS, "memory", lambda: {"first": lambda: 1, "second": fail, "third": lambda: 3})
    lines = suite.run_section("memory", file)
    found = json.loads(file.read_text())
    assert found["first"] == 1 and found["third"] == 3 and "illegal memory access" in found["second"]["failed"]
    assert ["failed" in line for line in lines] == [False, True, False]


def test_the_parts_are_all_of_it(suite):
    assert sorted(name for part in suite.PARTS.values() for name in part) == sorted(suite.SECTIONS)


def test_the_authors_iteration_updates_cross_attention_alone(suite, small_sd):
    iterate, student = importlib.import_module("authors_script").make_iteration(
        small_sd, torch.device("cpu"), steps=4, sampled=2
    )
    before = {name: value.clone() for name, value in student.state_dict().items()}
    iterate()
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("attn2" in name for name in changed)


def test_our_steps_are_timed_as_the_suite_times_them(suite):
    options = {"trajectories": 2, "num_inference_steps": 2, "train_batch_size": 2, "max_train_steps": 2, "device": "cpu"}
    found = suite._our_steps("shapes", options)
    assert set(found) == {"rollout_step_s", "training_step_s"} and all(0 < v < 10 for v in found.values())


def test_timings_run_once_each(suite, tmp_path, monkeypatch):
    run(monkeypatch, suite.kernel_timings, "--output", str(tmp_path / "timings"))
    with (tmp_path / "timings.csv").open() as file:
        assert {row["implementation"] for row in csv.DictReader(file)} == {"kernel", "eager"}
