"""What surrounds the steps of every method: signals, a full disk, and what is kept."""

import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import commands
from esd_peft import EraseConfig, UserError, erase
from esd_peft.runtime import distributed, interrupts
from esd_peft.training.checkpoint import Checkpoints
from esd_peft.training.rollout import Rollout
from esd_peft.training.trainer import Trainer
from esd_peft.training.trajectory_samples import TrajectorySamples
from runs import METHODS, shortest

STEPS = 4


@pytest.fixture(autouse=True)
def quick(few, eager):
    """Few prompts and images, the plain loss, and signals that end a run as those of a command do."""
    before = signal.getsignal(signal.SIGTERM)
    interrupts.at_once()
    yield
    signal.signal(signal.SIGTERM, before)


def config(model, output, method, **options):
    given = {"max_train_steps": STEPS, "train_batch_size": 4}
    return EraseConfig(concept="circle", model=str(model), output=output, **shortest(method) | given | options)


_WHOLE = {}


@pytest.fixture
def whole(small_sd, tmp_path_factory):
    """The adapter of a run of that method, not interrupted; made once."""

    def of(method):
        if method not in _WHOLE:
            output = tmp_path_factory.mktemp("whole") / "out"
            erase(config(small_sd, output, method))
            _WHOLE[method] = adapter(output)
        return _WHOLE[method]

    return of


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def signalled(monkeypatch, where, name, at=1):
    """Let a signal come when that is called for the `at`-th time."""
    calls, real = [], getattr(where, name)

    def calling(*args, **options):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
            if where is not Trainer:
                distributed.stop_together()
        return real(*args, **options)

    monkeypatch.setattr(where, name, calling)


@pytest.mark.parametrize("method", METHODS)
def test_a_signal_ends_it_after_the_step(small_sd, tmp_path, monkeypatch, whole, method):
    given = config(small_sd, tmp_path / "out", method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 3 of 4; --resume goes on from"):
        signalled(patch, Trainer, "step", 3)
        erase(given)
    assert [path.name for path in tmp_path.glob("out.checkpoint/step-*")] == ["step-00000003.safetensors"]
    assert not (tmp_path / "out").exists()
    erase(given.replace(resume=True))
    assert_same(adapter(tmp_path / "out"), whole(method))


@pytest.mark.parametrize("method", ["layers", "trajectories"])
def test_nothing_is_lost_if_it_is_interrupted_while_samples_are_collected(small_sd, tmp_path, monkeypatch, whole, method):
    """Once more from the beginning, and when it goes on: layers collect theirs anew, a buffer may be damaged."""
    given = config(small_sd, tmp_path / "out", method)
    where = (Rollout, "collect") if method == "layers" else (TrajectorySamples, "_fill")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled(patch, *where)
        erase(given)
    assert not [*tmp_path.glob("out.checkpoint/*")], "there is nothing to keep yet"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        signalled(patch, Trainer, "step", 2)
        erase(given)
    for buffer in tmp_path.glob("out.checkpoint/buffer-*"):
        buffer.write_bytes(b"junk")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 2; --resume goes on"):
        signalled(patch, *where)
        erase(given.replace(resume=True))
    erase(given.replace(resume=True))
    assert_same(adapter(tmp_path / "out"), whole(method))


@pytest.mark.parametrize("method", METHODS)
def test_a_full_disk_at_the_end_costs_nothing(small_sd, tmp_path, monkeypatch, whole, method):
    tried = []

    def full(self, step, *_):
        tried.append(step)
        raise UserError("the disk is full")

    expected = whole(method)
    monkeypatch.setattr(Checkpoints, "save", full)
    erase(config(small_sd, tmp_path / "full", method))
    assert tried == [STEPS]
    assert_same(adapter(tmp_path / "full"), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_checkpoint_and_say_so(tmp_path, number):
    output = tmp_path / "erased"
    words = ["erase", *["--concept", "circle", "--device", "cpu", "--num-validation-images", "0", "--output"], output]
    run = commands.Command(*words, "--max-train-steps", "100000")
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob("erased.checkpoint/step-*")] and time.monotonic() < deadline:
        time.sleep(0.1)
    second = commands.run(*words)
    assert "another run is writing there" in second.stderr and second.returncode == 2
    run.send_signal(number)
    done = run.wait()
    assert done.returncode == 130
    assert "--resume goes on from there" in done.stderr.splitlines()[-1]
    assert [*tmp_path.glob("erased.checkpoint/step-*")] and not output.exists()
