"""One job at a time in a process, one process at a time on an output; after a fork too."""

import os
import subprocess
import sys
import threading

import pytest

from esd_peft.errors import UserError
from esd_peft.io import locks
from esd_peft.io.jobs import lock_output, only_job
from esd_peft.io.outputs import check_output, new_directory, take_folder


def in_a_thread(job):
    """What it raised."""
    raised = []

    def run():
        try:
            job()
        except UserError as error:
            raised.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def in_a_fork(job):
    """Whether it ran without a `UserError`."""
    if (child := os.fork()) == 0:
        code = 2
        try:
            job()
            code = 0
        except UserError:
            code = 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def try_job():
    with only_job():
        pass


def try_hold(path):
    with lock_output(path):
        pass


def test_one_job_at_a_time():
    with only_job():
        try_job()  # erase runs evaluate
        assert "another thread of this process" in in_a_thread(try_job)[0]
        assert in_a_fork(try_job)  # nothing runs in the child
        assert "another thread of this process" in in_a_thread(try_job)[0]
    assert not in_a_thread(try_job)


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "deep" / "out"
    with lock_output(path):
        with pytest.raises(UserError, match="another run is writing there"):
            try_hold(path)
        code = f"from pathlib import Path\nfrom esd_peft.io.jobs import *\nwith lock_output(Path({str(path)!r})): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another run is writing there" in done.stderr
        try_hold(tmp_path / "deep" / "other")
    assert os.listdir(tmp_path / "deep") == []
    try_hold(path)


def test_a_fork_holds_nothing_and_releases_nothing(tmp_path):
    with lock_output(tmp_path / "out"):
        assert not in_a_fork(lambda: try_hold(tmp_path / "out"))
        reader, writer = os.pipe()
        if (lingering := os.fork()) == 0:  # a child that outlives what its parent held
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        with pytest.raises(UserError):
            try_hold(tmp_path / "out")
    try_hold(tmp_path / "out")
    os.close(writer)
    os.waitpid(lingering, 0)


def test_a_child_that_leaves_the_block_leaves_the_lock(tmp_path):
    child = 0
    with lock_output(tmp_path / "out"):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            with pytest.raises(UserError):
                try_hold(tmp_path / "out")
    if not child:
        os._exit(0)
    try_hold(tmp_path / "out")


def test_a_killed_run_holds_nothing(tmp_path):
    code = f"import os\nfrom esd_peft.io.jobs import *\nwith lock_output(Path({str(tmp_path / 'out')!r})):"
    subprocess.run([sys.executable, "-c", f"{code}\n os.kill(os.getpid(), 9)"])
    assert os.listdir(tmp_path) == [".out.lock"]
    try_hold(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_somebody_elses_file_is_no_lock(tmp_path):
    (tmp_path / ".out.lock").write_text("precious")
    with pytest.raises(UserError, match="is in the way"):
        try_hold(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_text() == "precious"


def test_an_empty_file_of_somebody_serves_as_lock_and_stays(tmp_path):
    (tmp_path / ".out.lock").write_text("")
    with lock_output(tmp_path / "out"), pytest.raises(UserError, match="another run is writing there"):
        try_hold(tmp_path / "out")
    assert (tmp_path / ".out.lock").read_bytes() == b""
    with new_directory(tmp_path / "deep", "a thing", overwrite=False):
        pass
    (tmp_path / "deep" / ".out.lock").write_text("")
    with pytest.raises(UserError, match=r"holds .out.lock, which esd_peft did not write"):
        check_output(tmp_path / "deep", "a thing", overwrite=True)


def test_what_is_being_written_inside_is_not_replaced(tmp_path):
    take_folder(tmp_path / "out", "a thing")
    with lock_output(tmp_path / "out" / "evaluation"), pytest.raises(UserError, match="another run is writing there"):
        check_output(tmp_path / "out", "a thing", overwrite=True)
    check_output(tmp_path / "out", "a thing", overwrite=True)


def test_whoever_waits_is_next(tmp_path):
    """As the processes of a run do that all want the same checkpoint converted."""
    order, held, done = [], threading.Event(), threading.Event()

    def first():
        with lock_output(tmp_path / "out"):
            held.set()
            done.wait(0.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with lock_output(tmp_path / "out", wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_a_place_without_locks_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "_lock", lambda handle: False)
    with lock_output(tmp_path / "out"):
        assert capsys.readouterr().err == f"note: {tmp_path} has no locks: see that no other run writes there\n"
    assert not list(tmp_path.iterdir())
