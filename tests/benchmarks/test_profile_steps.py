"""The counts behind kernels/README.md, against PyTorch's own counter and against sizes written out by hand."""

import importlib
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def profile_steps(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("profile_steps")


@pytest.fixture
def count(profile_steps):
    return profile_steps.Count(flops=1e12, bandwidth=1e9)


def test_bytes_and_least_time_of_single_operations(count):
    x, row, right = torch.zeros(10, 100), torch.zeros(100), torch.zeros(100, 50)
    with count:
        _ = x + row.expand(10, 100)  # an expanded row is read once
        x.view(100, 10).t()  # nothing moves
        _ = x @ right
    added, product = count.found["other elementwise"], count.found["matrix product"]
    assert (added["calls"], added["read"], added["written"]) == (1, 4 * 1100, 4 * 1000)
    assert added["seconds"] == pytest.approx(4 * 2100 / 1e9)  # its bytes, of a billion a second
    assert (product["flops"], product["read"]) == (2 * 10 * 100 * 50, 4 * (1000 + 5000))
    assert set(count.found) == {"other elementwise", "matrix product"}


def test_flops_of_a_unet_forward_and_backward_are_those_of_pytorchs_counter(count):
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    inputs = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), torch.zeros(2, 5, 8)
    with FlopCounterMode(display=False) as theirs:
        unet(*inputs).sample.sum().backward()
    with count:
        unet(*inputs).sample.sum().backward()
    found = count.found["convolution"]["flops"] + count.found["matrix product"]["flops"]
    by_name = {str(name): value for name, value in theirs.get_flop_counts()["Global"].items()}
    assert found == sum(value for name, value in by_name.items() if "attention" not in name)
    assert {"GroupNorm", "LayerNorm", "SiLU", "GELU", "attention"} <= set(count.table())
    assert sum(row["share"] for row in count.table().values()) == pytest.approx(1, abs=0.01)


def test_stable_diffusion_has_the_size_that_is_published(profile_steps):
    """859.5 M parameters, and about 0.8 TFLOP a sample and forward at 512²."""
    unet = profile_steps.architecture("SD 1.5").get_base_model()
    assert sum(p.numel() for name, p in unet.named_parameters() if "lora" not in name) == pytest.approx(859.5e6, rel=1e-3)
    total = profile_steps.count("SD 1.5", profile_steps.forward, (1e12, 1e9)).total()
    assert total["flops"] / (2 * profile_steps.BATCH) == pytest.approx(0.8e12, rel=0.02)
