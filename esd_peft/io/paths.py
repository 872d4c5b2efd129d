"""Questions about paths that anybody may have named, and what the system says where one may not be read.

pathlib raises for what lies in a folder that one may not enter, for links in a circle and for names that are too long. To
`exists`, `is_file` and `is_dir` nothing is there then; why is said where it is named (`why_closed`), or read (`reading`).
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
    """What the system has against looking at the path, or into a folder; none where it has nothing, or nothing is there."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except PermissionError as error:
        return system_reason(error)
    except (OSError, ValueError):
        return None
    return os.strerror(errno.EACCES) if is_folder and not os.access(path, os.R_OK | os.X_OK) else None


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system has against reading the file becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({system_reason(error)}); restore it, or your right to read it") from None
