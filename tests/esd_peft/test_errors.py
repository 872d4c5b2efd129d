"""What a command says when it fails, and what it does not hide."""

import sys

import pytest
import torch

from esd_peft import EraseConfig, UserError
from esd_peft.errors import OutOfMemory
from esd_peft.options.command_line import run_command
from esd_peft.runtime.profiling import PhaseProfiler

TOKEN = "hf_" + "aB3" * 10


def ended(main, capsys):
    """Exit code and standard error."""
    with pytest.raises(SystemExit) as stop:
        run_command(main)
    return stop.value.code, capsys.readouterr().err


def raises(error):
    def main():
        raise error

    return main


def test_a_sentence_is_one_line_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    said = f"--model a\x1b[31m\nb {TOKEN} a secret\udcff " + "x" * 5000
    code, err = ended(raises(UserError(said)), capsys)
    assert code == 2 and err.startswith("error: --model a [31m b *** ***") and err.count("\n") == 1 and len(err) < 2100


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(2**60),  # PyTorch's own sentence for the host
        lambda: bytearray(2**62),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
    ],
)
def test_too_little_memory_is_a_sentence(make, capsys):
    code, err = ended(lambda: next(make()), capsys)
    assert (
        code == 2 and err == "error: this machine has too little memory for that; take smaller numbers or a smaller model\n"
    )
    with pytest.raises(OutOfMemory, match="out of memory in rollout"), PhaseProfiler(torch.device("cpu")).phase("rollout"):
        next(make())


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 do not fit"), ValueError("a mistake"), KeyError("x")])
def test_mistakes_of_the_program_are_not_hidden(error):
    with pytest.raises(type(error)):
        run_command(raises(error))


def test_streams_are_as_they_were_afterwards(capsys):
    before = sys.stdout, sys.stderr
    run_command(lambda: print("done"))
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "done\n"


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\nb", "\u009b31m", "a\0b", "\udcff"])
@pytest.mark.parametrize("option", ["concept", "model", "output", "preserve"])
def test_names_are_text(option, name):
    with pytest.raises(UserError, match=f"--{option}: .* is no character of a name or prompt") as error:
        EraseConfig(**{"concept": "circle"} | {option: name})
    assert str(error.value).isprintable()


@pytest.mark.parametrize(("option", "length"), [("concept", 4001), ("model", 256), ("output", 256)])
def test_names_have_an_end(option, length):
    with pytest.raises(UserError, match=f"--{option}: longer than any name or prompt"):
        EraseConfig(**{"concept": "circle"} | {option: "x" * length})
    EraseConfig(**{"concept": "circle"} | {option: "x" * (length - 1)})


def test_links_in_a_circle(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="--output: a link in a circle of links; name another file"):
        EraseConfig(concept="circle", output=tmp_path / "loop")
