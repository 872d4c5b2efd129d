import pytest

from esd_kernels import guided_mse_reference
from esd_peft.training import target
from pipelines import small_stable_diffusion
from runs import few_prompts


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    """A small random Stable Diffusion directory that predicts ε, and one that predicts v. Do not write to it."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture
def few(monkeypatch):
    """Fewer prompts and images, so that a moment is enough."""
    few_prompts(monkeypatch.setattr)


@pytest.fixture
def eager(monkeypatch):
    """The loss without the interpreter of Triton, which takes a second for each layer and step."""
    monkeypatch.setattr(target, "guided_mse", guided_mse_reference)
