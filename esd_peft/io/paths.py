"""Path checks that do not raise, and error messages for paths that cannot be read.

pathlib raises for inaccessible folders, links in a circle, and names that are too long. `exists`, `is_file` and `is_dir`
return False for these. `why_closed` and `reading` give the reason.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from os.path import exists
from os.path import isdir as is_dir
from os.path import isfile as is_file
from pathlib import Path

from esd_peft.errors import UserError, system_reason

__all__ = ["exists", "is_dir", "is_file", "reading", "why_closed"]


def why_closed(path: str | Path) -> str | None:
    """Return the reason why a path or folder cannot be read; None if it can, or does not exist."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        return system_reason(error)
    except (OSError, ValueError):
        return None
    return os.strerror(errno.EACCES) if is_folder and not os.access(path, os.R_OK | os.X_OK) else None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error on reading the file into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({system_reason(error)}); restore it, or your right to read it") from None
