"""Files and folders that one run at a time holds; a lock goes with its process, however that ends.

A forked child has none of its parent's locks, and keeps none alive.
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

_held: set[int] = set()  # file descriptors of this process's locks


@contextlib.contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold the file or folder at `path`, which is there, within the block.

    Yields whether that keeps others out: some file systems have no locks, and Windows has none for folders. Raises
    `BlockingIOError` if it is held already, by another process or elsewhere in this one, and `FileNotFoundError` if
    whoever held it has removed it.
    """
    if fcntl is None and path.is_dir():
        yield False
        return
    process, handle = os.getpid(), os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _held.add(handle)
    try:
        sure = _lock(handle)
        if not os.path.samestat(os.stat(path), os.fstat(handle)):
            raise FileNotFoundError(errno.ENOENT, "is another one now", str(path))
        yield sure
    finally:
        if os.getpid() == process:  # a fork has closed it
            _held.discard(handle)
            os.close(handle)


def _lock(handle: int) -> bool:
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except BlockingIOError:
        raise
    except PermissionError as error:  # how Windows says that it is held
        raise BlockingIOError(*error.args) from None
    except OSError:
        return False
    return True


def _let_go() -> None:
    """In a forked child: the locks are the parent's, and end with it."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
