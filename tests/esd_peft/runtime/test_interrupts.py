"""Signals act within a step of whatever runs, and leave what is finished."""

import importlib
import json
import signal
import sys

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file

from esd_peft import EraseConfig, erase
from esd_peft.options.command_line import run_command
from esd_peft.runtime import distributed, interrupts
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student

QUICK = {"concept": "circle", "device": "cpu", "num_inference_steps": 8, "trajectories": 1, "rank": 2,
         "num_validation_images": 0}  # fmt: skip
STUDENT = {"rollout": "student", "buffer_refresh_interval": 2, "max_train_steps": 6, "preservation_ratio": 0.0,
           "num_inference_steps": 4}  # fmt: skip


@pytest.fixture(autouse=True)
def handlers():
    """As a command has them; afterwards as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    interrupts.at_once()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signalled(monkeypatch):
    """Send a signal in the call of the denoiser for which `when` is true; the list grows with each call after that."""
    after = []
    forward = UNet2DConditionModel.forward

    def send(number, when):
        def signalling(self, *args, **kwargs):
            made = forward(self, *args, **kwargs)
            if after:
                after.append(1)
            elif when():
                after.append(0)
                signal.raise_signal(number)
            return made

        monkeypatch.setattr(UNet2DConditionModel, "forward", signalling)
        return after

    return send


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_filling_of_the_buffer_ends_at_its_step_and_resumes_with_the_same_bits(
    small_sd, tmp_path, signalled, number, monkeypatch
):
    config = EraseConfig(model=str(small_sd), output=tmp_path / "out", **QUICK | STUDENT)
    erase(config.replace(output=tmp_path / "whole"))
    steps = []  # of each filling's trajectory
    collect, step = Rollout.collect, DDIMScheduler.step

    def counted(*args, **kwargs):
        if steps:  # else it is one of the rehearsal, before all work
            steps[-1] += 1
        return step(*args, **kwargs)

    monkeypatch.setattr(Rollout, "collect", lambda *args, **kwargs: steps.append(0) or collect(*args, **kwargs))
    monkeypatch.setattr(DDIMScheduler, "step", counted)
    after = signalled(number, lambda: len(steps) == 2 and steps[1] == 1)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 6; --resume goes on from there"):
        erase(config)
    assert sum(after) <= 2  # the rest of the same denoising step
    monkeypatch.undo()
    resumed = erase(config.replace(resume=True))
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert all(resumed[key] == whole[key] for key in ("nfe", "work")), "what was broken off is not counted twice"


@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_a_search_for_synonyms_ends_with_the_trajectory_at_hand_and_keeps_nothing(tmp_path, signalled, monkeypatch, method):
    searching = []
    ask = Student.predict_each
    monkeypatch.setattr(Student, "predict_each", lambda *args: searching.append(1) or ask(*args))
    after = signalled(signal.SIGTERM, lambda: searching)
    with pytest.raises(KeyboardInterrupt) as stop:
        options = {"method": method, "max_train_steps": 3, "num_inference_steps": 2, "trajectories": None}
        erase(EraseConfig(output=tmp_path / "out", **QUICK | options))
    assert "step" not in str(stop.value) and after
    assert len(searching) == 2, "all candidates, at two places of a trajectory"
    assert not [*tmp_path.glob("out*")]


def test_before_the_first_step_there_is_nothing_to_keep(small_sd, tmp_path, signalled):
    after = signalled(signal.SIGTERM, lambda: True)
    with pytest.raises(KeyboardInterrupt) as stop:
        erase(EraseConfig(model=str(small_sd), output=tmp_path / "out", **QUICK))
    assert not stop.value.args and sum(after) <= 1 and not [*tmp_path.iterdir()]


def run(module, capsys, monkeypatch, *words):
    """Exit code and what was said last."""
    monkeypatch.setattr(sys, "argv", [module, *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module(f"esd_peft.{module}").main)
    return stop.value.code, capsys.readouterr().err.splitlines()[-1]


def words(**options):
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_interrupted_images_leave_a_finished_adapter(small_sd, tmp_path, signalled, capsys, monkeypatch):
    output = tmp_path / "the erased"
    after = signalled(signal.SIGTERM, lambda: output.exists())
    options = words(model=small_sd, output=output, max_train_steps=1, **QUICK | {"num_validation_images": 1})
    code, said = run("erase", capsys, monkeypatch, *options)
    assert code == 130 and sum(after) <= 1
    assert f"the adapter in {output} is finished; for the images: python -m esd_peft.evaluate --erased '{output}'" in said
    assert adapter(output)


def test_an_evaluation_ends_at_once_and_goes_on_with_its_images(small_sd, tmp_path, signalled, capsys, monkeypatch):
    erase(EraseConfig(model=str(small_sd), output=tmp_path / "out", max_train_steps=1, **QUICK))
    report = words(erased=tmp_path / "out", output=tmp_path / "report", seeds=1, num_inference_steps=2, batch_size=2)
    images = tmp_path / "report" / "images" / "before"
    after = signalled(signal.SIGHUP, lambda: [*images.glob("*.png")])
    code, said = run("evaluate", capsys, monkeypatch, *report)
    assert code == 130 and said.startswith("interrupted") and sum(after) <= 1
    assert len([*images.glob("*.png")]) == 2


def test_what_is_ignored_stays_ignored(small_sd, tmp_path):
    """SIGHUP under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupts.at_once()
    with interrupts.noted() as seen:
        signal.raise_signal(signal.SIGHUP)
        assert not seen
        distributed.stop_together()
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with pytest.raises(interrupts.InterruptedBetweenSteps):
            distributed.stop_together()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_without_sighup(monkeypatch):
    """As on Windows."""
    monkeypatch.delattr(signal, "SIGHUP")
    interrupts.at_once()
    with interrupts.noted() as seen:
        signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGTERM]


def test_a_signal_in_the_last_step_is_not_lost(small_sd, tmp_path, signalled):
    steps = []

    def in_the_second_training_step():
        if torch.is_grad_enabled():
            steps.append(1)
        return len(steps) == 2

    signalled(signal.SIGTERM, in_the_second_training_step)
    config = EraseConfig(model=str(small_sd), output=tmp_path / "erased", max_train_steps=2, **QUICK)
    with pytest.raises(KeyboardInterrupt, match="after step 2 of 2; --resume goes on from there"):
        erase(config)
    assert not (tmp_path / "erased").exists()
    erase(config.replace(resume=True))
    assert len(steps) == 2 and (tmp_path / "erased" / "adapter_model.safetensors").is_file()


def test_a_handler_that_is_not_pythons_stays(monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    assert interrupts._handle(signal.default_int_handler) == {}
