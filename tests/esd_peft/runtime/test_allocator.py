"""What the commands ask of PyTorch's allocator for GPUs."""

import os

import pytest

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
    avoid_gaps()
    assert os.environ == after
