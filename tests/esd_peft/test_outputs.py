"""Files and directories appear whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from esd_peft.errors import UserError
from esd_peft.outputs import check_output, new_directory, new_file


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target, overwrite=False) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["a"]
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_block_keeps_what_was_there(tmp_path, error):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with (
        pytest.raises(UserError if isinstance(error, OSError) else error),
        new_directory(target, overwrite=True) as draft,
    ):
        (draft / "new").write_text("2")
        raise error
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["old"]


def test_overwriting_replaces_everything(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with new_directory(target, overwrite=True) as draft:
        (draft / "new").write_text("2")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(target) == ["new"]


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(UserError, match="No space"), new_file(path) as draft:
        draft.write_text("half")
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == ["result.json"] and path.read_text() == "old"
    with new_file(path) as draft:
        draft.write_text("new")
    assert os.listdir(tmp_path) == ["result.json"] and path.read_text() == "new"


def killed_while(tmp_path, code):
    """A process of its own runs `code` and is killed where that says `die()`."""
    lines = [
        "import os, signal",
        "from pathlib import Path",
        "from esd_peft import outputs",
        f"path = Path({str(tmp_path / 'out')!r})",
    ]
    lines += ["die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", code]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)]).returncode == -signal.SIGKILL


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    killed_while(tmp_path, "with outputs.new_directory(path, False) as draft:\n (draft / 'half').write_text('1')\n die()")
    killed_while(tmp_path, "with outputs.new_file(path) as draft:\n draft.write_text('1')\n die()")
    assert len(os.listdir(tmp_path)) == 2
    with new_file(tmp_path / "out") as draft:
        draft.write_text("living")
        check_output(tmp_path / "out", overwrite=False)
        assert os.listdir(tmp_path) == [draft.parent.name]
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_to_be_replaced_comes_back_if_the_new_one_never_took_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    code = "rename = Path.rename\ndef once(*names):\n rename(*names)\n die()\nPath.rename = once\n"
    killed_while(tmp_path, f"{code}with outputs.new_directory(path, True) as draft:\n (draft / 'new').write_text('2')")
    assert not (tmp_path / "out").exists()
    check_output(tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output(tmp_path / "new" / "out", overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        check_output(tmp_path, overwrite=False)
