"""Help and mistakes are answered before the libraries that compute are imported."""

import subprocess
import sys

import pytest

from esd_peft.options.commands import COMMANDS, answer_early, read_command_line
from esd_peft.options.erase import EraseConfig


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--no-such-option"], 2)])
def test_they_need_no_pytorch(command, words, code):
    line = [sys.executable, "-X", "importtime", "-m", f"esd_peft.{command}", *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert "usage:" in done.stdout if code == 0 else "error: " in done.stderr and "--help" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "esd_peft.options.erase" in imported and not imported & {"torch", "diffusers", "transformers", "peft"}


def test_what_is_right_is_left_to_the_command(capsys):
    answer_early(["python", "-m", "esd_peft.erase", "--concept", "circle"])
    answer_early(["python", "-m", "pytest", "--help"])
    answer_early(["python", "script.py", "--help"])
    assert capsys.readouterr() == ("", "")
    assert read_command_line(EraseConfig, ["--concept", "circle"]) == EraseConfig(concept="circle")


def test_a_mistake_is_said_once(capsys):
    with pytest.raises(SystemExit) as stop:
        answer_early(["python", "-m", "esd_peft.merge_adapter"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1
