"""How much a run does, known before it starts."""

import pytest

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.training.work import count_denoiser_calls


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 25 + 40),
        (
            {"trajectories": 30, "rollout_batch_size": 12, "rollout": "student", "buffer_refresh_interval": 10,
             "max_train_steps": 20},
            20 + 2 * 3 * 25 * 2,
        ),
        ({"method": "layers", "model": "emoji", "concept": "fox"}, 2 * 10),
        ({"method": "denoiser", "model": "emoji", "concept": "fox", "max_train_steps": 30}, 2 * 10 + 2 * 30),
        ({"method": "contrastive", "max_train_steps": 30}, 30),
    ],
)  # fmt: skip
def test_calls_of_the_denoiser_are_counted_as_they_are_made(options, calls):
    given = EraseConfig(**{"concept": "circle", "model": "shapes", "device": "cpu"} | options)
    config, _ = resolve(given, open_family(given.pretrained.model))
    assert count_denoiser_calls(config.buffer, config.training) == calls
