"""Files appear whole or not at all: everything is written in a temporary sibling folder, then renamed.

Such a draft is locked as long as its process lives; the next run removes those that a killed one has left.
"""

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from esd_peft import locks
from esd_peft.errors import UserError


def check_output(path: Path, overwrite: bool, inputs: Iterable[Path] = (), option: str = "--output") -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new directory later.

    Nor may it be or hold one of `inputs`, the working directory, or a mount point: it is replaced as a whole.
    """
    here = path.resolve()
    for other in (Path.cwd(), *inputs):
        if other.resolve().is_relative_to(here):
            raise UserError(f"{option} {path} is or holds {other}; name another directory")
    if path.is_mount():
        raise UserError(f"{option} {path} is a mount point and cannot be replaced; name a directory in it")
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {path} is a file; name a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{option} {path} is not empty; name another directory or add --overwrite")
    _check_writable(path, option)


def check_new_file(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new file later, or is an input."""
    if path.is_dir():
        raise UserError(f"--output {path} is a directory; name a file in it")
    if any(path.resolve() == other.resolve() for other in inputs):
        raise UserError(f"--output {path} is what is read; name another file")
    if path.exists() and not overwrite:
        raise UserError(f"--output {path} is already there; name another file or add --overwrite")
    _check_writable(path)


def _check_writable(path: Path, option: str = "--output") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left(path)
        with _draft(path):
            pass
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}; name a writable directory") from None


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool, option: str = "--output") -> Iterator[Path]:
    """A directory to fill; it takes the name `path` when the block ends well and vanishes when it does not.

    Raises `UserError` as `check_output` does, and for a full or failing disk.
    """
    check_output(path, overwrite, option=option)
    try:
        with _draft(path) as draft:
            yield draft
            draft.chmod(0o777 & ~_umask())
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
                path.rename(old)  # an empty directory may be renamed onto
                draft.rename(path)
                shutil.rmtree(old)
            else:
                draft.rename(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, path, option) from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file of that name to write to; it becomes `path` when the block ends well."""
    try:
        with _draft(path) as draft:
            yield draft / path.name
            (draft / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, path) from None


def remove_left(path: Path) -> None:
    """Remove the drafts of `path` that no living process holds.

    One that was killed while it replaced `path` may have left the old one under another name: that comes back.
    """
    for old in path.parent.glob(f".{glob.escape(path.name)}.old-*"):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)
    for draft in path.parent.glob(f".{glob.escape(path.name)}.draft-*"):
        with contextlib.suppress(OSError), locks.hold(draft) as sure:
            if sure:  # without locks nobody knows whose it is
                shutil.rmtree(draft)


@contextlib.contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A folder beside `path`, removed at the end if it is still there; its lock goes with the process, however that ends."""
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.draft-", dir=path.parent))
    try:
        with locks.hold(draft):
            yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _unwritable(error: Exception, path: Path, option: str = "--output") -> Exception:
    """A `UserError` for what went wrong while writing a draft of `path` (a full disk, say); other errors as they are."""
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if names and not any(name.startswith(f"{path.parent / f'.{path.name}.'}") for name in names):
        return error
    reason = error.args[0][0][2] if isinstance(error, shutil.Error) else getattr(error, "strerror", None) or error
    return UserError(f"{option} {path} cannot be written: {reason}; free some space or name another directory")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
