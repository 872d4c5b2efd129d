"""Locks on files and folders, which end with their process.

A forked child has no lock of its parent, and does not prolong any.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any = None
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

_handles: set[int] = set()  # file descriptors of this process's locks


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Lock the existing file or folder `path` within the block.

    Yields whether the lock is effective: some file systems have no locks, and Windows has none for folders. Raises
    `BlockingIOError` if it is locked already, by another process or elsewhere in this one, and `FileNotFoundError` if its
    last owner has removed it.
    """
    if fcntl is None and path.is_dir():
        yield False
        return
    process, handle = os.getpid(), os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _handles.add(handle)
    try:
        sure = _lock(handle)
        if not os.path.samestat(os.stat(path), os.fstat(handle)):
            raise FileNotFoundError(errno.ENOENT, "is another one now", str(path))
        yield sure
    finally:
        if os.getpid() == process:  # a fork has closed it
            _handles.discard(handle)
            os.close(handle)


def _lock(handle: int) -> bool:
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except BlockingIOError:
        raise
    except PermissionError as error:  # Windows' error for a locked file
        raise BlockingIOError(*error.args) from None
    except OSError:
        return False
    return True


def _let_go() -> None:
    """Close the parent's locks in a forked child."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
