"""Two processes, as accelerate launches them, do what one does; none of them outlives another one's end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import commands
from esd_peft import EraseConfig, UserError, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.session import in_session
from esd_peft.models import open_family
from esd_peft.options.command_line import parse
from esd_peft.runtime import distributed, failures
from esd_peft.training.rollout import Rollout
from runs import few_prompts

QUICK = ["--concept", "circle", "--device", "cpu", "--num-validation-images", "0", "--num-inference-steps", "4",
         "--trajectories", "3", "--train-batch-size", "5", "--max-train-steps", "6", "--preserve", "square"]  # fmt: skip
BY_PROMPTS = [word for word in QUICK if word not in ("--trajectories", "3")]  # which have trajectories of their own


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """As the commands have it."""
    few_prompts(monkeypatch.setattr)


def start(tmp_path, *arguments, usual=QUICK):
    """Two processes as a launcher would start them, with nobody who ends the other where one ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in ("0", "1")]
    return [commands.Command("erase", *usual, *arguments, cwd=tmp_path, env=there | rank) for rank in ranks]


def wait_for(condition):
    deadline = time.monotonic() + 90
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def endless(tmp_path, *arguments):
    """A run of two that has left a checkpoint and goes on."""
    run = start(tmp_path, "--max-train-steps", "100000", "--output", "erased", *arguments)
    wait_for(lambda: [*tmp_path.glob("erased.checkpoint/step-*")] or not all(each.process.is_alive() for each in run))
    assert all(each.process.is_alive() for each in run), [each.wait().stderr for each in run]
    return run


@pytest.mark.usefixtures("in_full")  # as the two are
def test_accelerate_starts_two_that_train_what_one_does(tmp_path):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = [sys.executable, *launcher, "-m", "esd_peft.erase", *QUICK, "--output", "two"]
    # to files: a pipe would stay open as long as one of them lives
    with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(words, stdout=out, stderr=err, env=environment, cwd=tmp_path)
    assert run.returncode == 0, (tmp_path / "stderr").read_text()
    assert_alike(tmp_path, [], (tmp_path / "stdout").read_text())


def test_so_do_two_with_rollouts_by_the_student(tmp_path):
    options = ["--rollout", "student", "--buffer-refresh-interval", "3"]
    done = [each.wait() for each in start(tmp_path, *options, "--output", "two")]
    assert [each.returncode for each in done] == [0, 0], done
    assert_alike(tmp_path, options, "".join(each.stdout for each in done))


@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_so_do_two_with_many_prompts(method, tmp_path):
    options = ["--method", method, "--max-train-steps", "2", "--unprompted-guidance", "1"]
    done = [each.wait() for each in start(tmp_path, *options, "--output", "two", usual=BY_PROMPTS)]
    assert [each.returncode for each in done] == [0, 0], done
    assert_alike(tmp_path, options, "".join(each.stdout for each in done), usual=BY_PROMPTS)


def test_a_signal_to_one_stops_both_while_cross_attention_learns(tmp_path):
    options = ["--method", "layers", "--max-train-steps", "80", "--output", "two"]
    run = start(tmp_path, *options, usual=BY_PROMPTS)
    wait_for(lambda: [*tmp_path.glob("two.checkpoint/step-*")])
    run[1].send_signal(signal.SIGTERM)
    done = [each.wait() for each in run]
    assert [each.returncode for each in done] == [130, 130], done
    (step,) = (int(path.stem[5:]) for path in tmp_path.glob("two.checkpoint/step-*"))
    said = f"interrupted after step {step} of 80; --resume goes on from there"
    assert "".join(each.stderr for each in done).count(said) == 1
    assert not (tmp_path / "two").exists()


def assert_alike(tmp_path, options, said, usual=QUICK):
    """What two made in the folder `two` is what one makes, and one of them spoke."""
    erase(parse(EraseConfig, "erase", [*usual, *options, "--output", str(tmp_path / "one")]))
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[1]["loss"]["last"] == pytest.approx(results[0]["loss"]["last"], rel=1e-4)
    for key in ("nfe", "work", "training_samples"):
        assert results[0][key] == results[1][key]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-3)
    assert said.count("To make it permanent") == 1


def test_a_process_that_is_killed_ends_the_run(tmp_path):
    run = endless(tmp_path)
    run[1].send_signal(signal.SIGKILL)
    done = run[0].wait()
    assert done.returncode == 2
    assert done.stderr.count("another process of this run has died") == 1
    assert not (tmp_path / "erased").exists() and [*tmp_path.glob("erased.checkpoint/step-*")]


def test_a_process_that_is_ended_while_it_asks_who_failed_first_says_why(monkeypatch):
    class Store:
        def add(self, key, count):
            raise KeyboardInterrupt

    monkeypatch.setattr(failures, "store", Store())
    assert failures.first_to_fail()


def test_every_process_has_the_settings_of_the_first_and_its_own_device(monkeypatch):
    given, seen = EraseConfig(concept="circle", device="cpu", validation_prompt="a star"), []
    others, _ = resolve(given.replace(per_device_batch_size=2), open_family("shapes"))
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    monkeypatch.setattr(distributed, "broadcast", lambda _: others.replace(device="cuda:0"))
    in_session(given, lambda config, session: seen.append(config) or {})
    assert seen == [others.replace(num_validation_images=0, validation_prompt=[])]


def buffer_of_one(tmp_path, monkeypatch):
    """What one process with the same options trains on."""
    collected = []
    collect = Rollout.collect

    def only_collect(*args, **kwargs):
        collected.append(collect(*args, **kwargs))
        raise UserError("that is all")

    monkeypatch.setattr(Rollout, "collect", only_collect)
    with pytest.raises(UserError, match="that is all"):
        erase(parse(EraseConfig, "erase", [*QUICK, "--output", str(tmp_path / "one")]))
    return collected[0]


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path, monkeypatch):
    run = endless(tmp_path)
    run[1].send_signal(signal.SIGINT)
    done = [each.wait() for each in run]
    assert [each.returncode for each in done] == [130, 130]
    said = "".join(each.stderr for each in done)
    assert said.count("--resume goes on from there") == 1
    assert "error:" not in said  # neither found the other one gone
    assert [*tmp_path.glob("erased.checkpoint/step-*")] and not (tmp_path / "erased").exists()
    # and both had the buffer that one process has
    (path,) = tmp_path.glob("erased.checkpoint/buffer-*")
    buffer = load_file(path)
    for name, value in vars(buffer_of_one(tmp_path, monkeypatch)).items():
        torch.testing.assert_close(buffer[name], value, rtol=1e-4, atol=1e-4)


def test_what_only_the_first_process_finds_ends_both(tmp_path):
    (tmp_path / "erased").mkdir()
    (tmp_path / "erased" / "file").touch()
    done = [each.wait() for each in start(tmp_path, "--output", "erased")]
    assert [each.returncode for each in done] == [2, 2]
    said = "".join(each.stderr for each in done)
    assert [line for line in said.splitlines() if line.startswith("error:")] == [
        "error: --output erased is not empty; name another directory or add --overwrite"
    ]


LEFT = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("erase --concept circle --print-config", 0),
        ("erase --concept circle --plan --prompt-templates bare", 0),
        ("erase", 2),
        ("merge_adapter --adapter nowhere --output merged", 2),
        ("evaluate --erased nowhere", 2),
        ("study.__main__ analyse --answers nowhere", 2),
    ],
)
def test_what_a_scheduler_left_in_the_environment_stops_no_command_of_one_process(tmp_path, command, code):
    done = commands.run(*command.split(), env=LEFT, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") if code else done.stdout


@pytest.mark.parametrize(
    "broken", [{"RANK": "x"}, {"RANK": "4"}, {"WORLD_SIZE": "many"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "99999"}], ids=str
)
def test_an_environment_that_makes_no_sense_is_said(tmp_path, monkeypatch, broken):
    for name, value in (LEFT | broken).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT .* do not fit together"):
        erase(EraseConfig(concept="circle", output=tmp_path / "out"))
