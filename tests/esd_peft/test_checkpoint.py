"""A run that is interrupted, anywhere and in any way, ends with the same adapter when it is resumed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, erase, robust
from esd_peft.distill import _Training
from esd_peft.errors import UserError

QUICK = {"num_inference_steps": 4, "trajectories": 3, "max_train_steps": 8, "train_batch_size": 4, "checkpoint_every": 2,
         "device": "cpu", "eval_seeds": 0}  # fmt: skip


def config(model, output, **options):
    return EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options))


class Stop(Exception):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture
def stopped_at(monkeypatch):
    """Runs a config and breaks off after that many steps."""

    def run(step, given):
        take = _Training.take

        def counted(self, batch):
            if self.step == step:
                raise Stop
            take(self, batch)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(_Training, "take", counted)
            erase(given)

    return run


VARIANTS = [
    {},
    {"rollout": "student", "refill_every": 3},
    {"refill_every": 2, "preserve": ["a square", "a star"]},
    {"optimizer": "AdamW8bit", "adapter": "none", "scope": "esd-x", "learning_rate": 1e-3},
    {"dtype": "bfloat16", "until": -0.99, "lr_scheduler": "linear", "lr_warmup_steps": 2},
    {"objective": "contrastive", "num_inference_steps": None, "trajectories": None, "learning_rate": 1e-3},
    {"robust": 1},
    {"robust": 1, "refill_every": 2},
]


def adapter(folder):
    name = "denoiser_weights" if (folder / "denoiser_weights.safetensors").is_file() else "adapter_model"
    return load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("step", "options"), [(2, {}), (7, {}), (4, VARIANTS[1]), (3, {"robust": 1}), *((5, options) for options in VARIANTS)]
)
def test_resumed_runs_end_the_same(small_sd, tmp_path, stopped_at, monkeypatch, options, step):
    monkeypatch.setattr(robust, "STEPS", 2)
    whole = erase(config(small_sd, tmp_path / "whole", **options))
    stopped_at(step, config(small_sd, tmp_path / "parts", **options))
    assert not (tmp_path / "parts").exists()
    parts = erase(config(small_sd, tmp_path / "parts", resume=True, **options))
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("loss", "direction_left", "training_tuples"):
        assert parts[key] == whole[key], key
    assert not (tmp_path / "parts.checkpoint").exists()


def test_twice_interrupted(small_sd, tmp_path, stopped_at):
    erase(config(small_sd, tmp_path / "whole"))
    stopped_at(3, config(small_sd, tmp_path / "parts"))
    stopped_at(6, config(small_sd, tmp_path / "parts", resume=True))
    erase(config(small_sd, tmp_path / "parts", resume=True))
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_bank_is_made_again(small_sd, tmp_path, stopped_at, damage):
    erase(config(small_sd, tmp_path / "whole"))
    stopped_at(5, config(small_sd, tmp_path / "parts"))
    (bank,) = (tmp_path / "parts.checkpoint").glob("bank-*")
    if damage is None:  # one bit
        content = bytearray(bank.read_bytes())
        content[-100] ^= 1
        bank.write_bytes(content)
    else:
        bank.write_bytes(damage)
    erase(config(small_sd, tmp_path / "parts", resume=True))
    first, second = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_resumed(small_sd, tmp_path, stopped_at):
    with pytest.raises(UserError, match="holds no checkpoint; leave --resume out"):
        erase(config(small_sd, tmp_path / "parts", resume=True))
    assert not [*tmp_path.iterdir()]
    stopped_at(5, config(small_sd, tmp_path / "parts"))
    with pytest.raises(UserError, match="add --resume to go on, or --overwrite"):
        erase(config(small_sd, tmp_path / "parts"))
    with pytest.raises(UserError, match=r"learning-rate was None, seed was 0"):
        erase(config(small_sd, tmp_path / "parts", resume=True, seed=1, learning_rate=1e-4))
    (state,) = (tmp_path / "parts.checkpoint").glob("step-*")
    content = bytearray(state.read_bytes())
    content[-9] ^= 4
    state.write_bytes(content)
    with pytest.raises(UserError, match="is damaged; remove"):
        erase(config(small_sd, tmp_path / "parts", resume=True))
    erase(config(small_sd, tmp_path / "parts", overwrite=True))
    assert not (tmp_path / "parts.checkpoint").exists()


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        "-m",
        "esd_peft.erase",
        "--concept",
        "circle",
        "--device",
        "cpu",
        "--eval-seeds",
        "0",
        *arguments,
    ]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_a_checkpoint_and_say_so(tmp_path, number):
    output = tmp_path / "erased"
    run = command("--output", str(output), "--max-train-steps", "100000", "--checkpoint-every", "2")
    deadline = time.monotonic() + 120
    while not [*tmp_path.glob("erased.checkpoint/step-*")] and time.monotonic() < deadline:
        time.sleep(0.1)
    second = command("--output", str(output))
    assert "another run is writing there" in second.communicate(timeout=120)[1] and second.returncode == 2
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert "--resume goes on from there" in said.splitlines()[-1]
    assert [*tmp_path.glob("erased.checkpoint/step-*")] and not output.exists()
