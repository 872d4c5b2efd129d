"""Layouts and number formats are the device's business: nothing that is saved shows them."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, MergeConfig, UserError, erase, merge_adapter
from esd_peft.models import open_family
from esd_peft.models.quantize import check_bitsandbytes
from esd_peft.runtime import devices
from esd_peft.runtime.devices import place, resolve_device, resolve_dtype, usable_memory
from esd_peft.training import student
from esd_peft.training.learners import PREDICTION
from esd_peft.training.trajectory_samples import TrajectorySamples
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


@pytest.fixture
def absolute_loss(monkeypatch):
    """Losses as mean squares of predictions: what the concept does, their unit, is less than rounding in random models."""
    fill = TrajectorySamples._fill

    def filled(self):
        fill(self)
        self.sizes = {PREDICTION: torch.ones(())}

    monkeypatch.setattr(TrajectorySamples, "_fill", filled)


@pytest.mark.parametrize("options", [{}, {"adapter_type": "loha"}, {"quantize": "int8"}], ids=str)
def test_adapters_in_fp32_work_without_autocast(small_sd, tmp_path, absolute_loss, options):
    precise = run(small_sd, tmp_path / "precise", **options)
    half = run(small_sd, tmp_path / "half", **options, dtype="bfloat16")
    rounding = 2e-5  # (2⁻⁸)² of predictions of size 1
    assert half["loss"]["first"] == pytest.approx(precise["loss"]["first"], abs=rounding)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev", "pixart", "sana"])
def test_every_family_runs_in_half_precision_without_autocast(tmp_path, monkeypatch, absolute_loss, name):
    """Rounding is more than these random models make of a concept: what is to be seen is that every layer runs."""
    draw_small(monkeypatch)
    model = save_family(name, tmp_path / "model")
    precise, half = (run(model, tmp_path / dtype, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half["loss"]["first"] == pytest.approx(precise["loss"]["first"], rel=0.5, abs=2e-4)


class Sees:
    """PyTorch's modules for kinds of devices on a machine that has so many of each."""

    def __init__(self, monkeypatch, **counts):
        self.calls: list[str] = []
        monkeypatch.setattr(devices, "_of", lambda kind: self.module(kind, counts.get(kind, 0)))

    def module(self, kind, count):
        return SimpleNamespace(
            is_available=lambda: count > 0, device_count=lambda: count, get_device_name=lambda device: f"{kind} card",
            mem_get_info=lambda device: (10, 16), memory_reserved=lambda device: 5, memory_allocated=lambda device: 3,
            synchronize=lambda device: self.calls.append(f"synchronize {device}"), empty_cache=lambda: None,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_any_gpu_is_found(monkeypatch, kind):
    seen = Sees(monkeypatch, **{kind: 1})
    device = resolve_device("auto")
    assert device.type == kind
    if kind == "mps":
        return  # of it PyTorch has functions of other names, which say nothing here
    assert devices.describe_device(device) == f"{kind} card"
    assert devices.memory_info(device) == (10, 16) and usable_memory(device) == 10 + 5 - 3
    devices.finish(device)
    assert seen.calls == [f"synchronize {kind}"]
    for named in (f"{kind}:1", "mps"):
        with pytest.raises(UserError, match=f"--device {named} is not there: PyTorch sees [01] .* devices; use cpu"):
            resolve_device(named)


def test_where_there_is_none_the_cpu_computes(monkeypatch):
    Sees(monkeypatch)
    assert resolve_device("auto").type == "cpu"


def test_memory_of_an_apple_gpu_is_what_the_system_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 20)
    mps = torch.device("mps")
    assert devices.memory_info(mps) == (70, 100)
    assert usable_memory(mps) == 80, "PyTorch's own cache is free, too"
    assert devices.peak_memory(mps) == 30


def test_other_gpus_compute_in_bfloat16():
    assert resolve_dtype("auto", torch.device("mps")) is torch.bfloat16


def test_an_apple_gpu_has_no_bitsandbytes():
    for quantize, optimizer in (("nf4", "AdamW"), ("none", "AdamW8bit")):
        with pytest.raises(UserError, match="has no kernels for Apple's GPUs; leave it out"):
            check_bitsandbytes(torch.device("mps"), quantize, optimizer)
