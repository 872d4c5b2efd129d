"""Distances between images, and between sets of features."""

import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, ResNetModel

from detectors import small_classifier, small_clip
from esd_peft.errors import UserError
from esd_peft.evaluation import similarity
from esd_peft.evaluation.distributions import Features, fid, kid


def test_pixel_distance():
    black, grey, white = (Image.new("RGB", (8, 6), (level,) * 3) for level in (0, 51, 255))
    assert similarity.pixel_distances([black, black, white], [black, grey, black]) == pytest.approx([0, 0.2, 1])
    half = Image.new("RGB", (8, 6))
    half.paste(white.crop((0, 0, 4, 6)), (0, 0))
    assert similarity.pixel_distances([half], [black]) == pytest.approx([math.sqrt(0.5)])


def test_lpips_is_asked_as_its_package_wants_it(monkeypatch):
    """The package needs torchvision and its weights; a stand-in records what it is given."""
    given = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, a, b):
            given.append((a, b))
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    module = types.ModuleType("lpips")
    module.LPIPS = LPIPS
    monkeypatch.setitem(sys.modules, "lpips", module)
    monkeypatch.setattr(similarity, "version", lambda package: "0.1.4")
    black, white = Image.new("RGB", (100, 100)), Image.new("RGB", (100, 100), "white")
    assert similarity.Lpips().distances([black, black], [black, white]) == pytest.approx([0, 2])
    assert given[0][0].shape == (2, 3, 64, 64) and given[0][0].min() == -1 and given[0][1].max() == 1
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="--lpips needs the packages lpips and torchvision"):
        similarity.Lpips()


def test_fid_of_known_gaussians():
    """Of sets whose sample mean and covariance are exact: ‖μ‖² + Σ (σ_a − σ_b)², and 0 for the same set."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(white.T))).T
    scale, shift = torch.tensor([1.0, 2, 3, 0.5]), torch.tensor([1.0, 0, -2, 0])
    assert fid(white, white * scale + shift) == pytest.approx(5 + ((1 - scale) ** 2).sum().item(), rel=1e-9)
    assert fid(white, white) == pytest.approx(0, abs=1e-9)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    assert fid(white @ turned, (white * scale + shift) @ turned) == pytest.approx(fid(white, white * scale + shift))


def test_fid_of_correlated_features_against_a_general_matrix_root():
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(60, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 3, generator=generator).double()
        for _ in "ab"
    )
    product = np.cov(a.T.numpy()) @ np.cov(b.T.numpy())
    values, vectors = np.linalg.eig(product)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert fid(a, b) == pytest.approx(expected.real)


def test_kid_against_the_sums_written_out():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(5, 3, generator=generator).double(), torch.randn(7, 3, generator=generator).double() + 1

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    within = [
        sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1)) for s in (a, b)
    ]
    across = sum(k(x, y) for x in a for y in b) / 35
    assert kid(a, b) == pytest.approx(sum(within) - 2 * across)


def test_features_are_the_models_own(tmp_path):
    images = [Image.new("RGB", (50, 40), (i * 60, 30, 90)) for i in range(3)]
    resnet, clip = small_classifier(tmp_path / "resnet", ["a", "b"]), small_clip(tmp_path / "clip")
    inputs = AutoImageProcessor.from_pretrained(resnet)(images, return_tensors="pt")
    with torch.no_grad():
        pooled = ResNetModel.from_pretrained(resnet).eval()(**inputs).pooler_output.flatten(1)
        projected = (
            CLIPModel.from_pretrained(clip)
            .eval()
            .get_image_features(**AutoImageProcessor.from_pretrained(clip)(images, return_tensors="pt"))
        )
    assert torch.allclose(Features(str(resnet)).of(images), pooled.double())
    found = Features(str(clip)).of(images)
    assert torch.allclose(found, getattr(projected, "pooler_output", projected).double())
    with pytest.raises(UserError, match=r"--features .* cannot be loaded"):
        Features(str(tmp_path / "no" / "thing"))
