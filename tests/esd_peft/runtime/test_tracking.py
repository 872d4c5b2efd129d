"""What is logged arrives, also when the run fails."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esd_peft.errors import UserError
from esd_peft.runtime.tracking import check_tracker, tracker


def test_losses_reach_tensorboard_even_if_the_run_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_tracker("tensorboard")
    with pytest.raises(UserError), tracker("tensorboard", {"concept": ["circle"], "device": "cpu"}) as report:
        report({"loss": 0.5}, 10)
        raise UserError("stopped")
    log = EventAccumulator(str(tmp_path / "runs" / "esd_peft"))
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("loss")] == [(10, 0.5)]


def test_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report-to wandb is not installed; pip install wandb"):
        check_tracker("wandb")
