"""What is logged arrives, also when the run fails."""

from types import SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esd_peft.errors import UserError
from esd_peft.runtime.tracking import Dashboard, check_tracker, dashboard


def test_losses_and_images_reach_tensorboard_even_if_the_run_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_tracker("tensorboard")
    with pytest.raises(UserError), dashboard("tensorboard", {"concept": ["circle"], "device": "cpu"}) as shown:
        shown.log({"loss": 0.5}, 10)
        shown.log_images({"validation/a red circle": [Image.new("RGB", (4, 6), "red")] * 2}, 20)
        raise UserError("stopped")
    log = EventAccumulator(str(tmp_path / "runs" / "esd_peft"))
    log.Reload()
    assert [(event.step, event.value) for event in log.Scalars("loss")] == [(10, 0.5)]
    (images,) = log.Images(log.Tags()["images"][0])
    assert (images.step, images.width, images.height) == (20, 8, 6), "both side by side"


def test_weights_and_biases_is_given_an_image_each():
    """It is not installed here: its tracker takes a list of images, which an array of them is."""
    given = []
    wandb = SimpleNamespace(name="wandb", log_images=lambda values, step: given.append((values, step)))
    Dashboard([wandb]).log_images({"validation/a circle": [Image.new("RGB", (4, 6))] * 2}, 20)
    ((values, step),) = given
    assert step == 20 and [image.shape for image in values["validation/a circle"]] == [(6, 4, 3)] * 2


def test_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--report-to wandb is not installed; pip install wandb"):
        check_tracker("wandb")
