import functools
import gc
import hashlib
import os

# before any kernel is imported: Triton decides at import whether it compiles or interprets
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # small tensors: more threads only wait for each other

import pytest
from hypothesis import settings

from esd_peft import models
from esd_peft.training import checkpoint
from pipelines import small_stable_diffusion
from runs import shorten
from slow import SLOW, slow_pattern

# the same examples every time; tests/programs/fuzz.py asks for --hypothesis-profile=large
settings.register_profile("few", max_examples=25, derandomize=True, database=None)
settings.register_profile("large", max_examples=10_000, derandomize=True, database=None)
settings.load_profile("few")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    found = [(item, pattern) for item in items if (pattern := slow_pattern(item.name))]
    for item, _ in found:
        item.add_marker(pytest.mark.slow)
    unused = SLOW.keys() - {pattern for _, pattern in found}
    if unused and config.args == config.getini("testpaths"):  # all tests are there
        raise pytest.UsageError(f"tests/helpers/slow.py: no test is called {min(unused)}; remove the pattern or mend it")


def pytest_collection_finish():
    """What is imported by now stays, so the garbage collector, which every erasure calls, need not go through it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # libraries say at the end what nobody has collected


@functools.cache
def digest(path, *_):
    return hashlib.sha256(path.read_bytes()).digest()


@pytest.fixture(scope="session", autouse=True)
def whole_models_are_checked_once():
    """Most tests open the same few pipelines, or copies of them. What has the same files as one that was whole is whole."""
    check, whole = models.check_model, set()

    def remembered(family, weights):
        files = [(path, path.stat()) for path in sorted(family.path.rglob("*")) if path.is_file()]
        content = (
            (str(path.relative_to(family.path)), digest(path, stat.st_mtime_ns, stat.st_size)) for path, stat in files
        )
        found = (type(family), family.variant, weights, *content)
        if not files or found not in whole:
            check(family, weights)
            whole.add(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "check_model", remembered)
        yield


@pytest.fixture(scope="session", autouse=True)
def shortened():
    """FLOPs are not measured, and the diagnosis draws little, except in tests with the fixture `in_full`."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch.setattr)
        yield patch


@pytest.fixture
def in_full(shortened):
    """A run measures its FLOPs, and its diagnosis draws as for users."""
    shortened.undo()
    yield
    shorten(shortened.setattr)


@pytest.fixture(scope="session")
def small_sd(tmp_path_factory):
    """A small random Stable Diffusion directory in fp16, ε-prediction. Do not write to it."""
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / "sd", dtype=torch.float16)


@pytest.fixture
def a_checkpoint_after_each_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
