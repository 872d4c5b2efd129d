import pytest

from pipelines import small_stable_diffusion


@pytest.fixture(scope="session", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    """A small random Stable Diffusion directory that predicts ε, and one that predicts v. Do not write to it."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)
