"""What a disk, a clock or another program does meanwhile: a clear error, or the same bits; nothing finished is lost.

Kills and full disks are in `tests/programs/faults.py`, a few of them in `tests/programs/test_faults.py`; the lock and
signals in `training/test_checkpoint.py`; truncated files and outputs that cannot be written in `test_bad_input.py`.
"""

import itertools
import shutil
import time

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from safetensors.torch import load_file, save_file

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.errors import UserError
from esd_peft.training.trainer import Trainer

QUICK = {"num_inference_steps": 4, "trajectories": 1, "max_train_steps": 4, "train_batch_size": 2,
         "device": "cpu", "num_validation_images": 0, "rank": 2}  # fmt: skip


pytestmark = pytest.mark.usefixtures("a_checkpoint_after_each_step")


def config(model, output, **options):
    return EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options))


@pytest.fixture(scope="module")
def erased(small_sd, tmp_path_factory):
    output = tmp_path_factory.mktemp("erased") / "adapter"
    erase(config(small_sd, output))
    return output


def flip(path, place):
    """One bit of the byte at that part of the file."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 0.2, 0.5, 0.9, 1])
def test_a_flipped_bit_of_an_adapter_is_noticed(erased, tmp_path, place):
    adapter = shutil.copytree(erased, tmp_path / "adapter")
    flip(adapter / "adapter_model.safetensors", place)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is damaged: it is not what was saved; restore it"):
        merge_adapter(MergeConfig(adapter=adapter, output=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("place", [0, 0.01, 0.5, 1])
def test_a_flipped_bit_of_the_base_is_an_error_or_said(erased, small_sd, tmp_path, place):
    base = shutil.copytree(small_sd, tmp_path / "base")
    flip(base / "unet" / NAME, place)
    try:
        record = merge_adapter(MergeConfig(adapter=erased, base=str(base), output=tmp_path / "out"))
    except UserError:
        assert [path.name for path in tmp_path.iterdir()] == ["base"]
    else:
        assert not record["base"]["trained_on_it"]


@pytest.mark.parametrize("part", [0.02, 0.6, 0.99])
def test_a_flipped_bit_of_a_checkpoint_is_noticed(small_sd, tmp_path, monkeypatch, part):
    break_off(small_sd, tmp_path / "out", monkeypatch)
    (state,) = (tmp_path / "out.checkpoint").glob("step-*")
    flip(state, part)
    with pytest.raises(UserError, match=f"--resume: {state} is damaged; remove"):
        erase(config(small_sd, tmp_path / "out", resume=True))
    assert state.exists()


def break_off(model, output, monkeypatch):
    """A run that dies after its third step."""
    step = Trainer.step

    def dies(self, batch):
        if self.taken == 3:
            raise ZeroDivisionError
        step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "step", dies)
        erase(config(model, output))


def test_a_model_that_changed_before_the_run_went_on(small_sd, tmp_path, monkeypatch):
    model = shutil.copytree(small_sd, tmp_path / "model")
    break_off(model, tmp_path / "out", monkeypatch)
    file = model / "unet" / NAME
    before = file.read_bytes()
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="the model's files have changed since; restore them, or --overwrite"):
        erase(config(model, tmp_path / "out", resume=True))
    file.write_bytes(before)
    erase(config(model, tmp_path / "out", resume=True))


def test_a_model_that_went_away_costs_nothing_finished(small_sd, tmp_path, monkeypatch):
    model = shutil.copytree(small_sd, tmp_path / "model")
    break_off(model, tmp_path / "out", monkeypatch)
    model.rename(tmp_path / "away")
    with pytest.raises(UserError, match="is not a diffusers pipeline directory"):
        erase(config(model, tmp_path / "out", resume=True))
    assert [*(tmp_path / "out.checkpoint").glob("step-*")]


def test_a_clock_that_jumps_changes_nothing(small_sd, erased, tmp_path, monkeypatch):
    jumps = itertools.cycle([0.0, -1e7, 1e9, 3.0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + next(jumps))
    break_off(small_sd, tmp_path / "out", monkeypatch)
    erase(config(small_sd, tmp_path / "out", resume=True))
    whole, jumped = (load_file(folder / "adapter_model.safetensors") for folder in (erased, tmp_path / "out"))
    assert whole.keys() == jumped.keys() and all(torch.equal(whole[name], jumped[name]) for name in whole)
    merge_adapter(MergeConfig(adapter=tmp_path / "out", output=tmp_path / "merged"))
