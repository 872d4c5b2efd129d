"""A run that is stopped while cross-attention learns, or after it, ends with the same result when it is resumed."""

import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from esd_kernels import guided_mse_reference
from esd_peft import EraseConfig, UserError, erase
from esd_peft.prompts import wordings
from esd_peft.runtime import distributed, interrupts
from esd_peft.training import attention, layers
from esd_peft.training.attention import AttentionTraining
from esd_peft.training.batches import BatchSampler
from esd_peft.training.checkpoint import Checkpoints
from esd_peft.training.layers import LayerLoss
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import _AdapterStudent
from esd_peft.training.trainer import Trainer
from runs import OF_LAYERS

STEPS = 6  # in which cross-attention learns
SAME = ("loss", "other_names", "diagnosis", "nfe", "training_samples", "trained_parameters")


class Stop(Exception):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few prompts, and a checkpoint after every other step."""
    few = replace(wordings.MANY_PROMPTS, contexts=12, fewest=12, held=24, phrases=8)
    for name, value in {"WORDS": 300, "NEAR_WORDS": 4, "MANY_PROMPTS": few}.items():
        monkeypatch.setattr(wordings, name, value)
    monkeypatch.setattr(layers, "guided_mse", guided_mse_reference)
    monkeypatch.setattr(attention, "CHECKPOINTS", 3)
    monkeypatch.setattr(attention, "LOSS_EVERY", 4)


def config(model, output, **options):
    given = OF_LAYERS | {"concept": "circle", "attention_steps": STEPS, "checkpointing_steps": 1}
    return EraseConfig(model=str(model), output=output, **given | options)


def stopped(monkeypatch, given, at):
    """Run it up to step `at` of all, or to where the adapter is saved."""
    calls = []

    def counted(take):
        def counting(*args):
            if len(calls) == at:
                raise Stop
            calls.append(take)
            return take(*args)

        return counting

    def full_disk(*_):
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(LayerLoss, "__call__", counted(LayerLoss.__call__))
        patch.setattr(Trainer, "step", counted(Trainer.step))
        if at == "save":
            patch.setattr(_AdapterStudent, "save", full_disk)
        erase(given)
    return calls


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


_WHOLE = {}


@pytest.fixture
def whole(small_sd, tmp_path_factory):
    """The adapter and the result of a run of so many steps after that, not interrupted; made once."""

    def of(steps):
        if steps not in _WHOLE:
            output = tmp_path_factory.mktemp("whole") / "out"
            result = erase(config(small_sd, output, max_train_steps=steps))
            _WHOLE[steps] = adapter(output), result
        return _WHOLE[steps]

    return of


@pytest.mark.parametrize(("at", "steps"), [(3, 0), (5, 3), ("save", 0), (STEPS + 2, 3)], ids=str)
def test_it_ends_the_same(small_sd, tmp_path, monkeypatch, whole, at, steps):
    given = config(small_sd, tmp_path / "out", max_train_steps=steps)
    stopped(monkeypatch, given, at)
    assert [*tmp_path.glob("out.checkpoint/step-*")] and not (tmp_path / "out").exists()
    learned = []
    forward = LayerLoss.__call__
    monkeypatch.setattr(LayerLoss, "__call__", lambda *args: learned.append(1) or forward(*args))
    result = erase(given.replace(resume=True))
    assert len(learned) == {3: 4, 5: 2}.get(at, 0), "from the last checkpoint on"
    assert_same(adapter(tmp_path / "out"), whole(steps)[0])
    for key in SAME:
        assert result[key] == whole(steps)[1][key], key
    assert not (tmp_path / "out.checkpoint").exists()


def test_twice_interrupted(small_sd, tmp_path, monkeypatch, whole):
    given = config(small_sd, tmp_path / "out", max_train_steps=3)
    stopped(monkeypatch, given, 3)
    stopped(monkeypatch, given.replace(resume=True), 3)
    result = erase(given.replace(resume=True))
    assert_same(adapter(tmp_path / "out"), whole(3)[0])
    assert all(result[key] == whole(3)[1][key] for key in SAME)


def test_a_signal_ends_it_after_the_step(small_sd, tmp_path, monkeypatch, whole):
    before = signal.getsignal(signal.SIGTERM)
    interrupts.at_once()
    given, calls, forward = config(small_sd, tmp_path / "out"), [], LayerLoss.__call__

    def signalled(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(LayerLoss, "__call__", signalled)
            says = "after step 3 of 6 of --attention-steps; --resume goes on from there"
            with pytest.raises(KeyboardInterrupt, match=says):
                erase(given)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.glob("out.checkpoint/step-*")] == ["step-00000003.safetensors"]
    erase(given.replace(resume=True))
    assert_same(adapter(tmp_path / "out"), whole(0)[0])


def test_what_it_has_learned_is_kept(small_sd, tmp_path, monkeypatch, whole):
    """Also if the teacher is seen once more, the buffer is filled, or the disk is full when all steps are taken."""
    before = signal.getsignal(signal.SIGTERM)
    interrupts.at_once()
    given = config(small_sd, tmp_path / "out", max_train_steps=3)
    stopped(monkeypatch, given, 3)
    given = given.replace(resume=True)
    try:
        for where, name, after in (
            (Rollout, "collect", "after step 2; --resume goes on"),
            (BatchSampler, "_fill", "after step 0 of 3; --resume goes on"),
        ):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=after):
                patch.setattr(where, name, lambda *_, **__: signal.raise_signal(signal.SIGTERM) or distributed.stop_here())
                erase(given)
    finally:
        signal.signal(signal.SIGTERM, before)
    erase(given)
    assert_same(adapter(tmp_path / "out"), whole(3)[0])
    save = Checkpoints.save

    def full(self, step, *states):
        if step == STEPS:
            raise UserError("the disk is full")
        save(self, step, *states)

    monkeypatch.setattr(Checkpoints, "save", full)
    erase(config(small_sd, tmp_path / "full"))
    assert_same(adapter(tmp_path / "full"), whole(0)[0])


def test_a_state_that_does_not_fit_is_said(small_sd, tmp_path, monkeypatch):
    given, run = config(small_sd, tmp_path / "out"), AttentionTraining.run
    stopped(monkeypatch, given, 3)
    called = []
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(AttentionTraining, "run", lambda *args: called.append(args) or (_ for _ in ()).throw(Stop))
        erase(given.replace(resume=True))
    training, _, left = called[0]
    group = {"state": {}, "param_groups": []}
    for spoilt in (
        {"step": 7}, {"step": 0}, {"step": "x"}, {"verdicts": [[5]]}, {"verdicts": []},
        {"under_way": None}, {"under_way": {}}, {"parameters": []}, {"optimizer": group}, {"schedule": {}}, {"draws": 3},
        {"draws": torch.zeros(3)}, {"sizes": {"x": 3}}, {"nfe": None},
    ):  # fmt: skip
        outer = spoilt if spoilt.keys() <= left.keys() else {"under_way": left["under_way"] | spoilt}
        training.taken = 0
        with pytest.raises(UserError, match=r"--resume: the checkpoint does not fit"):
            run(training, None, left | outer)
    training.taken = 0
    run(training, None, left)
    assert training.taken == STEPS
