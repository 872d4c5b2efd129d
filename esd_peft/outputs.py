"""Files appear whole or not at all: everything is written to a temporary sibling, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

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
        tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent).cleanup()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}; name a writable directory") from None


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool, option: str = "--output") -> Iterator[Path]:
    """A directory to fill; it takes the name `path` when the block ends well and vanishes when it does not.

    Raises `UserError` as `check_output` does, and for a full or failing disk.
    """
    check_output(path, overwrite, option=option)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            path.rename(old)  # an empty directory may be renamed onto
            draft.rename(path)
            shutil.rmtree(old)
        else:
            draft.rename(path)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, path, draft, option) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file name to write to; it becomes `path` when the block ends well. Keeps the suffix, which some writers read."""
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise _unwritable(error, path, draft) from None
    finally:
        draft.unlink(missing_ok=True)


def _unwritable(error: Exception, path: Path, draft: Path, option: str = "--output") -> Exception:
    """A `UserError` for what went wrong while writing `draft` (a full disk, say); other errors as they are."""
    if isinstance(error, OSError) and error.filename and not str(error.filename).startswith(str(draft)):
        return error
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{option} {path} cannot be written: {reason}; free some space or name another directory")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
