"""Files and directories appear whole or not at all, and never in the place of what somebody else made."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from esd_peft.errors import UserError
from esd_peft.io import marks
from esd_peft.io.outputs import (
    MARK,
    check_folder,
    check_new_file,
    check_output,
    empty_folder,
    new_directory,
    new_file,
    take_folder,
)

THING = "a thing"


def written(target, *names):
    """A directory as an earlier run left it."""
    with new_directory(target, THING, overwrite=False) as draft:
        for name in names:
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text("1")
    return target


def listed(folder):
    return sorted(set(os.listdir(folder)) - {MARK})


def test_a_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with new_directory(target, THING, overwrite=False) as draft:
        (draft / "a").write_text("1")
        assert not target.exists()
    assert listed(target) == ["a"]
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_block_keeps_what_was_there(tmp_path, error):
    target = written(tmp_path / "out", "old")
    with (
        pytest.raises(UserError if isinstance(error, OSError) else error),
        new_directory(target, THING, overwrite=True) as draft,
    ):
        (draft / "new").write_text("2")
        raise error
    assert os.listdir(tmp_path) == ["out"] and listed(target) == ["old"]


def test_overwriting_replaces_everything(tmp_path):
    target = written(tmp_path / "out", "old", "unet/old")
    with new_file(target / "result.json") as draft:  # as erase adds it
        draft.write_text("{}")
    take_folder(target / "evaluation", "another", part_of=target)  # as evaluate adds it
    with new_file(target / "evaluation" / "report.md") as draft:
        draft.write_text("")
    with new_directory(target, THING, overwrite=True) as draft:
        (draft / "new").write_text("2")
    assert os.listdir(tmp_path) == ["out"] and listed(target) == ["new"]


@pytest.mark.parametrize("name", ["notes.txt", "unet/mine.safetensors", ".git/config", "evaluation/mine.png"])
def test_what_somebody_else_put_there_is_not_overwritten(tmp_path, name):
    target = written(tmp_path / "out", "old", "unet/old")
    take_folder(target / "evaluation", "another", part_of=target)
    (target / name).parent.mkdir(exist_ok=True)
    (target / name).write_text("precious")
    with pytest.raises(UserError, match=f"holds {name}, which esd_peft did not write"):
        check_output(target, THING, overwrite=True)
    with pytest.raises(UserError, match=f"holds {name}"), new_directory(target, THING, overwrite=True):
        pass
    assert (target / name).read_text() == "precious" and (target / "old").exists()


def test_what_appears_there_during_the_work_is_not_overwritten(tmp_path):
    target = written(tmp_path / "out", "old")
    with pytest.raises(UserError, match=r"holds notes.txt"), new_directory(target, THING, overwrite=True) as draft:
        (draft / "new").write_text("2")
        (target / "notes.txt").write_text("precious")
    assert os.listdir(tmp_path) == ["out"] and listed(target) == ["notes.txt", "old"]


def test_a_directory_of_somebody_else_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", THING, overwrite=False)  # nothing is lost with an empty one
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    for job in (check_output, new_directory(tmp_path / "out", THING, overwrite=True).__enter__):
        with pytest.raises(UserError, match=r"holds model.safetensors, which esd_peft did not write"):
            job(tmp_path / "out", THING, overwrite=True) if job is check_output else job()
    with pytest.raises(UserError, match="holds files that esd_peft did not write"):
        take_folder(tmp_path / "out", THING)
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"


def test_folders_that_are_named_like_drafts_are_left_alone(tmp_path):
    for name in (".out.draft-12345678", ".out.old-12345678", ".out.draft-mine", ".out.old-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "out").write_text("precious")
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside" / "a").write_text("precious")
    (tmp_path / ".out.draft-abcdefgh").symlink_to(tmp_path / "aside")
    (tmp_path / ".out.draft-ijklmnop").mkdir()  # empty
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    check_output(tmp_path / "out", THING, overwrite=True)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    written(tmp_path / "out", "a")
    assert {str(path) for path in tmp_path.rglob("*")} > {*before}


def test_a_folder_that_is_added_to(tmp_path):
    check_folder(tmp_path / "out", THING, writes=["report.md"])
    take_folder(tmp_path / "out", THING)
    with new_file(tmp_path / "out" / "report.md") as draft:
        draft.write_text("1")
    check_folder(tmp_path / "out", THING, writes=["report.md"])
    (tmp_path / "out" / "result.json").write_text("precious")
    with pytest.raises(UserError, match=r"holds result.json, which esd_peft did not write"):
        check_folder(tmp_path / "out", THING, writes=["report.md", "result.json"])
    with pytest.raises(UserError, match=r"holds result.json"):
        empty_folder(tmp_path / "out", THING)
    assert listed(tmp_path / "out") == ["report.md", "result.json"]
    (tmp_path / "out" / "result.json").unlink()
    empty_folder(tmp_path / "out", THING)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(tmp_path):
    """An input, reached in several ways."""
    folder = tmp_path / "models" / "base"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "model.safetensors").write_text("precious")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "link_to_all").symlink_to(tmp_path / "models")
    return folder


@pytest.mark.parametrize("given", ["models/base", "link", "link_to_all/base", "models/base/unet/../"])
@pytest.mark.parametrize("output", ["models/base", "link", "models", "link_to_all", "models/base/out", "link/unet", "."])
def test_an_output_is_no_input_and_neither_holds_the_other(model, tmp_path, given, output):
    with pytest.raises(UserError, match=r"is or holds|lies in"):
        check_output(tmp_path / output, THING, overwrite=True, inputs=[tmp_path / given])
    check_output(tmp_path / "models" / "out", THING, overwrite=True, inputs=[tmp_path / given])


@pytest.mark.parametrize("output", ["link/unet/model.safetensors", "models/base/new.safetensors", "models/base/unet/new"])
def test_a_file_lies_in_no_input(model, tmp_path, output):
    with pytest.raises(UserError, match=r"is or holds|lies in"):
        check_new_file(tmp_path / output, THING, overwrite=True, inputs=[model])
    check_new_file(tmp_path / "models" / "new.safetensors", THING, overwrite=True, inputs=[model])
    with pytest.raises(UserError, match="was not written by this command"):
        check_new_file(model / "unet" / "model.safetensors", THING, overwrite=True)


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "there")  # as yet to nothing
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "file.json")
    written(tmp_path / "out", "a")
    with new_directory(tmp_path / "out", THING, overwrite=True) as draft:
        (draft / "b").write_text("2")
    with new_file(tmp_path / "file") as draft:
        draft.write_text("3")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "file").is_symlink()
    assert listed(tmp_path / "disk" / "there") == ["b"] and (tmp_path / "disk" / "file.json").read_text() == "3"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "circle", THING, overwrite=True)


@pytest.mark.parametrize("name", ["a b", "ä", "-x", "a\nb", "[a]*?", "'\"", ".hidden", "x" * 200])
def test_odd_names(tmp_path, name):
    for _ in range(2):
        check_output(tmp_path / name, THING, overwrite=True)
        with new_directory(tmp_path / name, THING, overwrite=True) as draft:
            (draft / name).write_text("1")
    assert os.listdir(tmp_path) == [name] and listed(tmp_path / name) == [name]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_cannot_be(tmp_path, name):
    for job in (lambda: check_output(tmp_path / name, THING, True), lambda: check_new_file(tmp_path / name, THING, True)):
        with pytest.raises(UserError, match=r"--output .* cannot be written: "):
            job()


def test_the_name_of_the_lists(tmp_path):
    for job in (lambda: check_output(tmp_path / MARK, THING, True), lambda: check_folder(tmp_path / MARK, THING)):
        with pytest.raises(UserError, match="choose another one"):
            job()


def as_nobody(code):
    """A process without rights runs `code`; what it printed. It may not read Python's own folder, perhaps."""
    lines = [
        "import encodings.ascii, encodings.utf_8_sig, os",
        "from pathlib import Path",
        "from esd_peft.io import outputs",
        "from esd_peft.errors import UserError",
    ]
    lines += ["if os.geteuid() == 0:", " os.setgroups([]); os.setgid(65534); os.setuid(65534)", "try:"]
    lines += [f" {line}" for line in code.splitlines()]
    lines += ["except UserError as error:", " print(error)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of two users")
def test_what_another_user_protects_is_noticed_before_the_work():
    top = os.path.realpath(os.path.join("/tmp", f"esd-peft-{os.getpid()}"))
    try:
        os.mkdir(top)
        os.chmod(top, 0o1777)  # as /tmp: everybody may add, nobody may rename what is another's
        written(Path(top) / "out", "a")
        os.chmod(os.path.join(top, "out"), 0o777)
        with open(os.path.join(top, "file.json"), "w") as file:
            json.dump(marks.signed({}, THING), file)
        said = as_nobody(f"outputs.check_output(Path({top!r}) / 'out', 'a thing', True)")
        assert "cannot be written: Operation not permitted" in said
        said = as_nobody(f"outputs.check_new_file(Path({top!r}) / 'file.json', 'a thing', True)")
        assert "cannot be written: Operation not permitted" in said
        assert sorted(os.listdir(top)) == ["file.json", "out"]
        os.chmod(top, 0o755)
        said = as_nobody(f"outputs.check_output(Path({top!r}) / 'new', 'a thing', True)")
        assert "cannot be written: Permission denied" in said
    finally:
        shutil.rmtree(top)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_everything_has_the_modes_of_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with new_directory(tmp_path / "out", THING, overwrite=False) as draft:
            (draft / "unet").mkdir(mode=0o700)
            save_file({"a": torch.zeros(1)}, draft / "unet" / "model.safetensors")  # which makes it 0600
        with new_file(tmp_path / "file.safetensors") as draft:
            save_file({"a": torch.zeros(1)}, draft)
        secret = tmp_path / "secret"
        secret.write_text("")
        secret.chmod(0o640)
        with new_directory(tmp_path / "private", THING, overwrite=False, private_as=[secret]) as draft:
            (draft / "a").write_text("")
    finally:
        os.umask(before)
    modes = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p != secret}
    for name, mode in modes.items():
        whole = (0o777 if (tmp_path / name).is_dir() else 0o666) & ~mask
        assert mode == (whole & ~0o007 if name.startswith("private") else whole), name


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


def test_a_fork_does_not_remove_the_draft_of_its_parent(tmp_path):
    with new_file(tmp_path / "out") as draft:
        draft.write_text("1")
        if (child := os.fork()) == 0:
            try:
                raise SystemExit  # and out of the block
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    assert (tmp_path / "out").read_text() == "1"


def killed_while(tmp_path, code):
    """A process of its own runs `code` and is killed where that says `die()`."""
    lines = [
        "import os, signal",
        "from pathlib import Path",
        "from esd_peft.io import outputs",
        f"path = Path({str(tmp_path / 'out')!r})",
    ]
    lines += ["die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", code]
    assert subprocess.run([sys.executable, "-c", "\n".join(lines)]).returncode == -signal.SIGKILL


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    killed_while(
        tmp_path, "with outputs.new_directory(path, 'a thing', False) as draft:\n (draft / 'half').write_text('1')\n die()"
    )
    killed_while(tmp_path, "with outputs.new_file(path) as draft:\n draft.write_text('1')\n die()")
    assert len(os.listdir(tmp_path)) == 2
    with new_file(tmp_path / "out") as draft:
        draft.write_text("living")
        check_output(tmp_path / "out", THING, overwrite=False)
        assert os.listdir(tmp_path) == [draft.parent.name]
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "living"


@pytest.mark.parametrize("left", [1, 3, 4])
def test_a_removal_that_was_killed_is_finished(tmp_path, left):
    """Killed before the n-th file, or the folder, goes."""
    written(tmp_path / "out", "a", "unet/b", "unet/c")
    code = (
        f"import shutil\ncount = [{left}]\ndef once(job):\n def counted(*args, **options):\n  if not count[0]: die()\n"
        "  count[0] -= 1\n  return job(*args, **options)\n return counted\n"
        "os.unlink, os.rmdir = once(os.unlink), once(os.rmdir)\n"
    )
    killed_while(
        tmp_path, f"outputs.check_output(path, 'a thing', True)\n{code}outputs.empty_folder(path, 'a thing')\ndie()"
    )
    check_output(tmp_path / "out", THING, overwrite=True)


def test_what_was_to_be_replaced_comes_back_if_the_new_one_never_took_its_name(tmp_path):
    written(tmp_path / "out", "old")
    code = "rename = Path.rename\ndef once(*names):\n rename(*names)\n die()\nPath.rename = once\n"
    killed_while(
        tmp_path, f"{code}with outputs.new_directory(path, 'a thing', True) as draft:\n (draft / 'new').write_text('2')"
    )
    assert not (tmp_path / "out").exists()
    check_output(tmp_path / "out", THING, overwrite=True)
    assert os.listdir(tmp_path) == ["out"] and listed(tmp_path / "out") == ["old"]


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output(tmp_path / "new" / "out", THING, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "file", THING, overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        check_output(tmp_path / "file" / "out", THING, overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        check_output(tmp_path, THING, overwrite=False)


def test_the_lock_of_the_run_itself_is_no_file_of_somebody_else(tmp_path):
    """It lies inside where the folder above may not be written, as that of a mounted directory."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_bytes(b"esd_peft\n")
    check_folder(tmp_path / "out", THING)
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UserError, match="holds files that esd_peft did not write"):
        check_folder(tmp_path / "out", THING)
