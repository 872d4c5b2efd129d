from dataclasses import replace

import pytest

from esd_kernels import guided_mse_reference
from esd_peft.prompts import augmentation
from esd_peft.training import contrastive, target
from pipelines import small_stable_diffusion


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    """A small random Stable Diffusion directory that predicts ε, and one that predicts v. Do not write to it."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture
def few(monkeypatch):
    """Fewer prompts and images, so that a moment is enough."""
    many, some = augmentation.MANY_PROMPTS, augmentation.FEW_PROMPTS
    fewer = {
        "WORDS": 300,
        "NEAR_WORDS": 4,
        "MANY_PROMPTS": replace(many, contexts=24, fewest=24, held=24, phrases=16),
        "FEW_PROMPTS": replace(some, alone=12, near=12, contexts=8, fewest=8, held=8, phrases=16),
    }
    for name, value in fewer.items():
        monkeypatch.setattr(augmentation, name, value)
    monkeypatch.setattr(contrastive, "IMAGES", 4)


@pytest.fixture
def eager(monkeypatch):
    """The loss without the interpreter of Triton, which takes a second for each layer and step."""
    monkeypatch.setattr(target, "guided_mse", guided_mse_reference)
