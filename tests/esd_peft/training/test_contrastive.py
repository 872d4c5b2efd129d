"""The contrastive mode against its formula, and its images."""

import math

import pytest
import torch

from esd_peft import EraseConfig, erase
from esd_peft.errors import UserError
from esd_peft.io.pixels import read_images
from esd_peft.training.batch import Batch
from esd_peft.training.contrastive import ReferenceSamples, augment, contrastive_loss
from esd_peft.training.learners import PREDICTION
from runs import prepare


def test_the_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    answer, noise, reference = torch.randn(3, 5, 4, 6, 6, generator=generator)
    ones = torch.ones(5)
    batch = Batch({"inputs": answer}, {}, {PREDICTION: torch.cat([noise, reference])}, ones, ones)
    expected = 0.0
    for a, n, r in zip(answer.double(), noise.double(), reference.double(), strict=True):
        positive = (a * n).sum() / (a.norm() * n.norm()) / 0.07
        negative = (a * r).sum() / (a.norm() * r.norm()) / 0.07
        expected -= math.log(positive.exp() / (positive.exp() + 0.5 * negative.exp())) / 5
    assert contrastive_loss({PREDICTION: answer}, batch).item() == pytest.approx(expected, rel=1e-5)


def test_an_order_of_other_images_is_refused(small_sd):
    run = prepare(small_sd, concept="circle", method="contrastive", max_train_steps=1)
    sampler = ReferenceSamples(run.rollout, run.table, torch.zeros(1, 8, 4, 16, 16), 5, torch.Generator())
    next(sampler)
    state = sampler.state_dict()
    assert len(state["order"]) == 3
    sampler.load_state_dict(state)
    with pytest.raises(ValueError, match="other images"):
        sampler.load_state_dict(state | {"order": torch.tensor([8])})


def test_images_vary_and_stay_images():
    images = torch.rand(6, 3, 32, 24, generator=torch.Generator().manual_seed(0))
    varied = augment(images, torch.Generator().manual_seed(1))
    assert varied.shape == images.shape and varied.min() >= 0 and varied.max() <= 1
    assert all((a - b).abs().mean() > 1e-3 for a, b in zip(varied, images, strict=True))
    assert torch.equal(varied, augment(images, torch.Generator().manual_seed(1)))


def test_it_trains(small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr("esd_peft.training.contrastive.IMAGES", 2)
    config = EraseConfig(concept=["circle", "striped"], model=str(small_sd), output=tmp_path / "out",
                         num_validation_images=0, method="contrastive", device="cpu", rank=2)  # fmt: skip
    result = erase(config)
    assert result["training_samples"] == 2 * 2 * 10, "two concepts of two images, in ten variations each"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match="--reference"):
        read_images(tmp_path, (8, 8), "--reference")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        read_images(tmp_path, (8, 8), "--reference")
