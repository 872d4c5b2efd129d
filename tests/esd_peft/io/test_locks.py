"""One holds it at a time; on Windows (here: without fcntl, with a stand-in for its own module) files only."""

import subprocess
import sys
import textwrap

import pytest

from esd_peft.io.locks import try_lock


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_holds_it_at_a_time(tmp_path, kind):
    path = tmp_path / "it"
    path.mkdir() if kind == "folder" else path.touch()
    with try_lock(path) as sure:
        assert sure
        with pytest.raises(BlockingIOError), try_lock(path):
            pass
        other = [sys.executable, "-c", f"from esd_peft.io.locks import *\nwith try_lock(Path({str(path)!r})): pass"]
        assert "BlockingIOError" in subprocess.run(other, capture_output=True, text=True).stderr
    with try_lock(path) as sure:
        assert sure


def test_what_is_not_there_cannot_be_held(tmp_path):
    with pytest.raises(FileNotFoundError), try_lock(tmp_path / "nothing"):
        pass


AS_ON_WINDOWS = """
    import os, subprocess, sys, types  # the second looks for msvcrt, too
    from pathlib import Path
    fcntl, held = __import__("fcntl"), []
    sys.modules["fcntl"] = None

    def locking(handle, mode, count):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, count)
            if os.fstat(handle).st_ino in held:  # lockf is the process's, msvcrt's the opening's
                raise OSError
        except OSError:
            raise PermissionError(13, "Permission denied") from None
        held.append(os.fstat(handle).st_ino)

    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""


def run_as_on_windows(program, *arguments):
    text = textwrap.dedent(AS_ON_WINDOWS) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_held_on_windows_and_folders_go_without(tmp_path):
    (tmp_path / "file").touch()
    program = """
        from esd_peft.io.locks import try_lock
        folder = Path(sys.argv[1])
        with try_lock(folder) as sure:
            print(sure)
        with try_lock(folder / "file") as sure:
            print(sure)
            try:
                with try_lock(folder / "file"):
                    print("twice")
            except BlockingIOError:
                print("held")
    """
    assert run_as_on_windows(program, tmp_path).split() == ["False", "True", "held"]


def test_an_erasure_without_fcntl(small_sd, tmp_path):
    program = """
        from esd_peft import EraseConfig, erase
        from esd_peft.training import checkpoint
        checkpoint.SECONDS = 0.0
        quick = {"num_inference_steps": 2, "trajectories": 1, "max_train_steps": 2, "rank": 2, "num_validation_images": 0}
        output = Path(sys.argv[2])
        erase(EraseConfig(concept="circle", model=sys.argv[1], device="cpu", output=output, **quick))
        print(*sorted(path.name for path in output.parent.iterdir()))
    """
    assert run_as_on_windows(program, small_sd, tmp_path / "erased") == "erased\n"
