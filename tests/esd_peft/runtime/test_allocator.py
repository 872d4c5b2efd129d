"""What the commands ask of PyTorch's allocator for GPUs."""

import os

import pytest

from esd_peft.options.command_line import run_command
from esd_peft.runtime.allocator import avoid_gaps


@pytest.mark.parametrize(
    ("given", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
    ],
    ids=["nothing", "the old name", "the new name"],
)
def test_the_allocator_leaves_no_gaps_unless_the_user_says_otherwise(monkeypatch, given, after):
    monkeypatch.setattr("os.environ", dict(given))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    avoid_gaps()
    assert os.environ == after


def test_the_allocator_is_left_alone_under_wsl(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    avoid_gaps()
    assert not os.environ


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_driver_that_refuses_extending_is_one_sentence_that_names_the_variable(monkeypatch, capsys, name):
    def allocate():
        raise RuntimeError("CUDA driver error: unknown error")

    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):  # commands of other tests have set one
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(SystemExit) as end:
        run_command(allocate)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert f"set {name}=max_split_size_mb:64,expandable_segments:False" in said
    monkeypatch.setenv(name, "expandable_segments:False")
    with pytest.raises(RuntimeError, match="CUDA driver error"):
        run_command(allocate)
