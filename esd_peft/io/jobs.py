"""Exclusive use: one job at a time in a process, and one process at a time for an output."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from esd_peft.errors import UserError, system_reason
from esd_peft.io import locks

_CONTENT = b"esd_peft\n"  # of our lock files, which are removed; an empty file can be locked too, and stays
_job = threading.RLock()  # a job may run another one inside


@contextlib.contextmanager
def only_job() -> Iterator[None]:
    """Allow one erase, evaluate or merge_adapter at a time in this process: they change global state of PyTorch and others.

    Raises `UserError` if another thread is at it.
    """
    mine = _job
    if not mine.acquire(blocking=False):
        raise UserError("another thread of this process is erasing, merging or evaluating; wait for it, or start a process")
    try:
        yield
    finally:
        mine.release()


@contextlib.contextmanager
def lock_output(path: Path, option: str = "--output", wait: bool = False) -> Iterator[None]:
    """Lock the output `path` within the block. Raises `UserError` if another run has locked it, or waits for its end."""
    process = os.getpid()
    with contextlib.ExitStack() as stack:
        try:
            real = path.resolve()
            real.parent.mkdir(parents=True, exist_ok=True)
            is_sibling = real.name and (os.access(real.parent, os.W_OK) or not real.is_dir())
            file = real.with_name(f".{real.name}.lock") if is_sibling else real / ".lock"
            stack.enter_context(_locked(file, wait))
        except BlockingIOError:
            raise UserError(
                f"{option} {path}: another run is writing there; wait for it, or name another directory"
            ) from None
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links that go in a circle
            reason = system_reason(error)
            raise UserError(f"{option} {path} cannot be written: {reason}; name a writable directory") from None
        try:
            yield
        finally:
            if os.getpid() == process:  # in a fork of this process the lock is the parent's
                with contextlib.suppress(OSError):  # Windows removes no file that is open
                    if _content(file) == _CONTENT:
                        file.unlink()


@contextlib.contextmanager
def _locked(file: Path, wait: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        locked = False
        while not locked:
            with contextlib.suppress(FileExistsError), file.open("xb") as made:
                made.write(_CONTENT)
            with contextlib.suppress(FileNotFoundError):  # its owner has removed it in the meantime: try again
                if _content(file) not in (_CONTENT, b""):
                    raise OSError(None, f"{file} is in the way")
                try:
                    if not stack.enter_context(locks.try_lock(file)):
                        print(f"note: {file.parent} has no locks: see that no other run writes there", file=sys.stderr)
                    locked = True
                except BlockingIOError:
                    if not wait:
                        raise
                    time.sleep(0.2)
        yield


def is_lock(file: Path) -> bool:
    """Return whether it is a lock file of this module. Raises `BlockingIOError` if it is locked."""
    if not file.name.endswith(".lock") or _content(file) != _CONTENT:
        return False
    with locks.try_lock(file):
        return True


def _content(file: Path) -> bytes | None:
    """Return the first bytes of a file; None if it is no regular file or cannot be read."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return None
    try:
        with file.open("rb") as opened:
            return opened.read(len(_CONTENT) + 1)
    except PermissionError as error:
        if os.name == "nt":  # where locked files cannot be read
            raise BlockingIOError(*error.args) from None
        return None


def _forget() -> None:
    """Reset the job lock in a forked child."""
    global _job
    _job = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
