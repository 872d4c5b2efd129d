"""Commands on narrow encodings, and beside a reader that leaves: the same end as anywhere else."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from esd_peft.io.terminal import say
from esd_peft.options.command_line import run_command

STUDY = [sys.executable, "-m", "esd_peft.study"]


@pytest.fixture
def made(tmp_path):
    """Two folders of images for a study, with names outside ASCII."""
    for name in ("été", "日本 語"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "a.png")
    (tmp_path / "key.json").write_text(
        json.dumps({"study": "s", "question": "Zażółć?", "conditions": ["été"], "items": {"1": {"condition": "été"}}})
    )
    (tmp_path / "answers.csv").write_text("study,rater,item,rating\ns,R,1,3\n")
    return tmp_path


def run(folder, *words, **options):
    return subprocess.run([*STUDY, *words], cwd=folder, capture_output=True, **options)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": e} for e in ("ascii", "latin-1", "cp1252", "utf-16")] + [{"LC_ALL": "C"}],
    ids=str,
)
def test_every_encoding_takes_every_name(made, environment):
    make = ["make", "--condition", "été", "--condition", "日本 語", "--question", "Zażółć?", "--output", "ö ut"]
    done = run(made, *make, env=os.environ | environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    said = done.stdout.decode(encoding)
    assert "2 images of 2 conditions" in said and "--key '" in said  # quoted: the name has a space
    done = run(made, "analyse", "--key", "key.json", "--answers", "answers.csv", env=os.environ | environment)
    assert done.returncode == 0 and not done.stderr and "R" not in done.stdout.decode(encoding, "replace").split()
    refused = run(made, "analyse", "--key", "日本 語", env=os.environ | environment)
    assert refused.returncode == 2 and b"Traceback" not in refused.stderr


@pytest.mark.parametrize("words", [["analyse", "--key", "key.json", "--answers", "answers.csv"], ["make", "--help"]])
def test_a_reader_that_leaves_changes_nothing(made, words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*STUDY, *words], cwd=made, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and not done.stderr


def test_nor_does_one_of_standard_error(capfd):
    """Progress bars are written there in the middle of the work."""
    program = "import sys; from esd_peft.options.command_line import run_command\n"
    program += "def main():\n    for _ in range(9): print('x' * 9999, file=sys.stderr, flush=True)\n    print('done')\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program + "run_command(main)"], stderr=write, stdout=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and done.stdout == b"done\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_is_lost_is_said(made):
    with open("/dev/full", "w") as full:
        words = [*STUDY, "analyse", "--key", "key.json", "--answers", "answers.csv"]
        done = subprocess.run(words, cwd=made, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output cannot be written: No space left on device; all else is done\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_closed_streams(made, closed):
    line = f'"{sys.executable}" -m esd_peft.study analyse --key key.json --answers answers.csv {closed}'
    assert subprocess.run(line, shell=True, cwd=made, capture_output=True).returncode == 0


def test_what_a_terminal_would_obey_is_escaped(capsys):
    run_command(lambda: say("a \x1b[31mred\x07 \u202etxt\u009b\r name\nof two lines, café η"))
    said = capsys.readouterr().out
    assert said == "a \\x1b[31mred\\x07 \\u202etxt\\x9b\\r name\nof two lines, café η\n"
