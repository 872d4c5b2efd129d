import os

# before any kernel is imported: Triton decides at import whether it compiles or interprets
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # small tensors: more threads only wait for each other

import pytest
from hypothesis import settings

from pipelines import small_stable_diffusion

# the same examples every time; tests/programs/fuzz.py asks for --hypothesis-profile=large
settings.register_profile("few", max_examples=25, derandomize=True, database=None)
settings.register_profile("large", max_examples=10_000, derandomize=True, database=None)
settings.load_profile("few")


@pytest.fixture(scope="session")
def small_sd(tmp_path_factory):
    """A small random Stable Diffusion directory in fp16, ε-prediction. Do not write to it."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / "sd", dtype=torch.float16)
