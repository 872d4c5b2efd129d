"""Files and directories appear whole or not at all."""

import os

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


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output(tmp_path / "new" / "out", overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        check_output(tmp_path, overwrite=False)
