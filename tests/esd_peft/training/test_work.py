"""How much a run does, known before it starts."""

import pytest

from esd_peft import EraseConfig
from esd_peft.defaults import resolve
from esd_peft.models import open_family
from esd_peft.training.options import TrainingOptions
from esd_peft.training.work import count_denoiser_calls, stages


@pytest.mark.parametrize(("steps", "rounds", "parts"), [(40, 0, [40]), (280, 3, [40, 80, 80, 80]), (8, 3, [1, 2, 2, 3])])
def test_every_round_is_twice_as_long_as_the_start(steps, rounds, parts):
    assert stages(TrainingOptions(max_train_steps=steps, robust=rounds)) == parts


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 25 + 40),
        (
            {"trajectories": 30, "rollout_batch_size": 12, "rollout": "student", "buffer_refresh_interval": 10,
             "max_train_steps": 20},
            20 + 2 * 3 * 25 * 2,
        ),
    ],
)  # fmt: skip
def test_calls_of_the_denoiser_are_counted_as_they_are_made(options, calls):
    config, _ = resolve(EraseConfig(concept="circle", device="cpu", **options), open_family("shapes"))
    assert count_denoiser_calls(config.buffer, config.training) == calls
