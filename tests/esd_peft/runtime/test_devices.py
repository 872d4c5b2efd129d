"""Layouts and number formats are the device's business: nothing that is saved shows them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.models import open_family
from esd_peft.runtime.devices import place
from esd_peft.training import student
from families import draw_small, save_family

QUICK = {"num_inference_steps": 3, "trajectories": 2, "max_train_steps": 1, "train_batch_size": 2,
         "device": "cpu", "num_validation_images": 0}  # fmt: skip


def run(model, output, **options):
    return erase(EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options)))


@pytest.fixture
def channels_last(monkeypatch):
    """On the CPU too."""

    def placed(denoiser, device):
        denoiser.to(device, memory_format=torch.channels_last)
        assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(student, "place", placed)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "full"},
        {"scope": "esd-u", "adapter_type": "none", "optimizer": "AdamW8bit", "learning_rate": 1e-4},
        {"scope": "esd-u", "adapter_type": "none", "learning_rate": 1e-4},
        {"scope": "esd-u", "adapter_type": "lokr", "gradient_checkpointing": True},
        {"scope": "esd-x", "quantize": "nf4"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_what_is_trained_in_channels_last_is_saved_as_usual(small_sd, tmp_path, request, options):
    plain = run(small_sd, tmp_path / "plain", **options)
    request.getfixturevalue("channels_last")
    ours = run(small_sd, tmp_path / "erased", **options)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    name = "denoiser_weights" if options.get("adapter_type") == "none" else "adapter_model"
    first, second = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("plain", "erased"))
    for key, value in first.items():
        assert second[key].is_contiguous()
        # Adam's first step is the learning rate, up or down; values in another order would be further apart
        torch.testing.assert_close(second[key], value, rtol=0, atol=2.5 * options.get("learning_rate", 1e-3))
    merge_adapter(MergeConfig(adapter=tmp_path / "erased", output=tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "erased.json").read_text())


def test_a_cpu_keeps_the_layout(small_sd):
    denoiser = open_family(str(small_sd)).load_denoiser(torch.float32)
    place(denoiser, torch.device("cpu"))
    assert denoiser.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("options", [{}, {"adapter_type": "loha"}, {"quantize": "int8"}], ids=str)
def test_adapters_in_fp32_work_without_autocast(small_sd, tmp_path, options):
    precise = run(small_sd, tmp_path / "precise", **options)
    half = run(small_sd, tmp_path / "half", **options, dtype="bfloat16")
    rounding = 2e-5  # (2⁻⁸)² of predictions of size 1
    assert half["loss"]["first"] == pytest.approx(precise["loss"]["first"], abs=rounding)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev", "pixart", "sana"])
def test_every_family_runs_in_half_precision_without_autocast(tmp_path, monkeypatch, name):
    """Rounding is more than these random models make of a concept: what is to be seen is that every layer runs."""
    draw_small(monkeypatch)
    model = save_family(name, tmp_path / "model")
    precise, half = (run(model, tmp_path / dtype, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half["loss"]["first"] == pytest.approx(precise["loss"]["first"], rel=0.5, abs=2e-4)
