"""Files and folders that one run at a time holds; a lock goes with its process, however that ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any = None
try:
    import fcntl
except ImportError:  # Windows
    import msvcrt


@contextlib.contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold the file or folder at `path`, which is there, within the block.

    Yields whether that keeps others out: some file systems have no locks, and Windows has none for folders. Raises
    `BlockingIOError` if it is held already, by another process or elsewhere in this one.
    """
    if fcntl is None and path.is_dir():
        yield False
        return
    handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)
    try:
        yield _lock(handle)
    finally:
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
