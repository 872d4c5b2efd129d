"""A device that is too small: the run is tried once more with less of it at once, or ends with a sentence."""

import itertools
import os
import subprocess
import sys
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from esd_peft import EraseConfig, erase
from esd_peft.erase import main
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import MemoryEstimator, smaller
from esd_peft.errors import OutOfMemory, UserError
from esd_peft.models import open_family
from esd_peft.options.command_line import run_command

QUICK = {"num_inference_steps": 2, "trajectories": 8, "max_train_steps": 4, "train_batch_size": 8,
         "device": "cpu", "num_validation_images": 0, "rank": 2}  # fmt: skip


pytestmark = pytest.mark.usefixtures("a_checkpoint_after_each_step")


def config(model, output, **options):
    return EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options))


@pytest.fixture
def too_much(monkeypatch):
    """Lets the denoiser run out of memory wherever `is_too_much` says so of its input and of the call's number.

    No other one runs before one that failed is gone: on a device there would be no room for both.
    """
    forward = UNet2DConditionModel.forward

    def install(is_too_much):
        calls, failed = itertools.count(), []

        def limited(self, sample, *args, **kwargs):
            if sample.device.type == "meta":  # planned
                return forward(self, sample, *args, **kwargs)
            assert all(one() in (self, None) for one in failed)
            if is_too_much(sample, next(calls)):
                failed.append(weakref.ref(self))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, sample, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "forward", limited)

    return install


@pytest.fixture(scope="module")
def whole(small_sd, tmp_path_factory):
    """What the run gives where there is enough memory: its directory, and its result."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, erase(config(small_sd, output))


def learns(sample):
    return torch.is_grad_enabled()


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(first, second):
    first, second = adapter(first), adapter(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("fails", "phase", "less"),
    [
        (lambda sample, call: call == 0, "rollout", {"rollout_batch_size": 6}),
        (lambda sample, call: learns(sample) and len(sample) > 4, "train", {"per_device_batch_size": 4}),
    ],
)
def test_a_run_that_is_too_large_goes_on_with_less_and_says_so(small_sd, tmp_path, too_much, capsys, fails, phase, less):
    asked = erase(config(small_sd, tmp_path / "asked", **less))
    too_much(fails)
    result = erase(config(small_sd, tmp_path / "tried"))
    ((name, value),) = less.items()
    said = f"out of memory in {phase}; once more with --{name.replace('_', '-')} {value}\n"
    assert said in capsys.readouterr().err
    asked["config"]["checkpoint"]["output"] = str(tmp_path / "tried")
    assert result["config"] == asked["config"]
    assert same(tmp_path / "asked", tmp_path / "tried")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asked", "tried"]


def test_it_goes_on_from_its_checkpoint(small_sd, whole, tmp_path, too_much, capsys):
    seen = []

    def once_in_the_third_step(sample, call):
        seen.extend([call] if learns(sample) else [])
        return len(seen) == 3 and seen[-1] == call

    too_much(once_in_the_third_step)
    result = erase(config(small_sd, tmp_path / "parts"))
    assert "once more with --per-device-batch-size 4" in capsys.readouterr().err
    assert len(seen) == 3 + 2 * 2  # the steps after the checkpoint, in halves
    assert result["training_samples"] == whole[1]["training_samples"]
    assert result["loss"]["last"] == pytest.approx(whole[1]["loss"]["last"], rel=1e-3)
    assert not (tmp_path / "parts.checkpoint").exists()


def test_a_resumed_run_keeps_its_checkpoint(small_sd, tmp_path, too_much):
    too_much(lambda sample, call: learns(sample) and (tmp_path / "out.checkpoint/step-00000002.safetensors").exists())
    with pytest.raises(OutOfMemory):
        erase(config(small_sd, tmp_path / "out"))
    with pytest.raises(UserError, match=r"learning-rate was 0\.01"):
        erase(config(small_sd, tmp_path / "out", resume=True, learning_rate=1e-4))
    too_much(lambda sample, call: learns(sample) and len(sample) > 4)
    resumed = erase(config(small_sd, tmp_path / "out", resume=True))
    assert resumed["config"]["memory"]["per_device_batch_size"] == 4


@pytest.mark.parametrize("fails", [lambda sample, call: True, lambda sample, call: learns(sample)])
def test_twice_too_large_is_a_sentence_and_leaves_nothing(small_sd, tmp_path, too_much, capsys, monkeypatch, fails):
    too_much(fails)
    options = {"concept": "circle", "model": small_sd, "output": tmp_path / "out"} | QUICK
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]
    monkeypatch.setattr(sys, "argv", ["erase", *words])
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    (error,) = (line for line in said if line.startswith("error:"))
    assert sum(line.startswith("note:") for line in said) == 1 and "Traceback" not in "".join(said)
    assert all(option in error for option in ("--memory-budget", "--quantize nf4", "--offload"))
    assert not [*tmp_path.iterdir()]


def test_a_finished_adapter_is_not_lost_to_its_images(small_sd, whole, tmp_path, too_much):
    too_much(lambda sample, call: (tmp_path / "out" / "adapter_model.safetensors").exists())
    with pytest.raises(UserError, match=r"out is finished, but the device ran out of memory over its images"):
        erase(config(small_sd, tmp_path / "out", num_validation_images=1))
    assert same(whole[0], tmp_path / "out")


def way_down(model, phase, **options):
    """The settings that are left to try, one after the other, and the base."""
    given, family = config(model, "out", **options), open_family(str(model))
    used, prompts = resolve(given, family)
    sizes = MemoryEstimator(used, prompts, family)
    while (used := smaller(sizes, given, used, phase)) is not None:
        memory = used.memory
        base = "offload" if memory.offload else memory.quantize
        yield memory.per_device_batch_size, used.buffer.rollout_batch_size, memory.gradient_checkpointing, base


ALONE = [(1, 12, True, base) for base in ("none", "nf4", "offload")]
LIGHT = [(False, "nf4"), (True, "offload")]
CONTRASTIVE = {"method": "contrastive", "num_inference_steps": None, "trajectories": None, "train_batch_size": None}


@pytest.mark.parametrize(
    ("phase", "options", "steps"),
    [
        ("encode", {}, []),
        ("load", {}, [(8, 12, *base) for base in LIGHT]),
        ("rollout", {}, [*((8, few, False, "none") for few in (6, 3, 1)), *((8, 1, *base) for base in LIGHT)]),
        ("train", {}, [*((few, 12, False, "none") for few in (4, 2, 1)), *ALONE]),
        ("train", CONTRASTIVE, [*((few, 12, False, "none") for few in (16, 8, 4, 2, 1)), *ALONE]),
        # what is set stays
        ("rollout", {"rollout_batch_size": 8}, [(8, 8, *base) for base in LIGHT]),
        ("train", {"per_device_batch_size": 8, "compile": "on"}, [(8, 12, True, "none"), (8, 12, True, "nf4")]),
        ("train", {"gradient_checkpointing": True, "per_device_batch_size": 2, "quantize": "int8"}, []),
    ],
)
def test_the_way_down(small_sd, phase, options, steps):
    assert [*way_down(small_sd, phase, **options)] == steps


def test_of_two_processes_none_starts_anew_or_waits(small_sd, tmp_path):
    script = tmp_path / "second_is_small.py"
    script.write_text(
        "import os, torch\n"
        "from diffusers import UNet2DConditionModel\n"
        "from esd_peft.erase import main\n"
        "from esd_peft.options.command_line import run_command\n"
        "plain = UNet2DConditionModel.forward\n"
        "def forward(self, sample, *args, **kwargs):\n"
        "    if sample.is_meta:\n"
        "        return plain(self, sample, *args, **kwargs)\n"
        "    raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "if os.environ['RANK'] == '1':\n"
        "    UNet2DConditionModel.forward = forward\n"
        "run_command(main)\n"
    )
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    options = f"--concept circle --model {small_sd} --device cpu --num-validation-images 0 --output out".split()
    with (tmp_path / "stderr").open("w") as err:
        run = subprocess.run(
            [sys.executable, *launcher, str(script), *options],
            stderr=err,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            timeout=120,
        )
    assert run.returncode != 0
    said = (tmp_path / "stderr").read_text()
    assert said.count("error: ") == 1 and said.count("once more") == 0
    assert "error: the device ran out of memory in rollout; plan for less with --memory-budget" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.checkpoint").exists()
