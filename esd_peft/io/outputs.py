"""Where files go: they appear whole or not at all, never in the place of an input or of what somebody else made.

Everything is written in a temporary sibling folder, then renamed. Such a draft is locked as long as its process lives; the
next run removes those that a killed one has left. A directory that this package made holds a list of the files that it
wrote there (`MARK`), and only these are ever replaced or removed. Links are followed: what they name is the output.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from esd_peft.errors import UserError, system_reason
from esd_peft.io import locks
from esd_peft.io.jobs import is_lock

MARK = ".esd_peft"  # a name a line, in JSON
_EVERYTHING = "*"  # in the mark of a folder that is made to be filled and emptied


Inputs = Iterable[str | Path | None]  # what is read: files, folders, hub ids (which are neither), and nothing


def check_output(path: Path, overwrite: bool, inputs: Inputs = (), option: str = "--output") -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new directory later.

    Nor may it be, hold or lie in one of `inputs`, be the working directory or a mount point: it is replaced as a whole.
    """
    with _said(path, option):
        real = path.resolve()
        keep_apart(path, inputs, option)
        if real.is_mount():
            raise UserError(f"{option} {path} is a mount point and cannot be replaced; name a directory in it")
        if os.path.lexists(real) and not real.is_dir():
            raise UserError(f"{option} {path} is a file; name a directory")
        if _filled(real):
            if not overwrite:
                raise UserError(f"{option} {path} is not empty; name another directory or add --overwrite")
            _check_own(path, option)
        _check_writable(real)


def check_new_file(path: Path, overwrite: bool, inputs: Inputs = (), own: bool = True) -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new file later, or is or lies in an input.

    `own` says whether this package wrote what is there: nothing else is replaced.
    """
    with _said(path):
        if path.is_dir():
            raise UserError(f"--output {path} is a directory; name a file in it")
        keep_apart(path, inputs)
        if os.path.lexists(path.resolve()):
            if not own:
                raise UserError(f"--output {path} is there and was not written by this command; name another file")
            if not overwrite:
                raise UserError(f"--output {path} is already there; name another file or add --overwrite")
        _check_writable(path.resolve())


def keep_apart(path: Path, inputs: Inputs, option: str = "--output") -> None:
    """Raise `UserError` if the output `path` is, holds or lies in one of `inputs`, or holds the working directory."""
    if path.resolve().name == MARK:
        raise UserError(f"{option} {path} has the name that esd_peft gives its lists of files; choose another one")
    there = [Path(other) for other in inputs if other is not None and os.path.exists(other)]
    for other in (Path.cwd(), *there):
        if _within(other, path):
            raise UserError(f"{option} {path} is or holds {other}; name another directory")
    for other in there:
        if _within(path, other):
            raise UserError(f"{option} {path} lies in {other}, which is read; name another directory")


def _within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is or lies in `outer`, whatever links, mounts and spellings lead there."""
    inner, outer = inner.resolve(), outer.resolve()
    if inner.is_relative_to(outer):
        return True
    return outer.exists() and any(p.exists() and outer.samefile(p) for p in (inner, *inner.parents))


def check_folder(path: Path, inputs: Inputs = (), writes: Iterable[str] = (), option: str = "--output") -> None:
    """Raise `UserError` now, before any work, if `path` could not be a folder that is added to: new, empty or our own.

    Nor may it be, hold or lie in one of `inputs`, or hold a file that the caller `writes` and this package did not write.
    """
    with _said(path, option):
        real = path.resolve()
        keep_apart(path, inputs, option)
        if os.path.lexists(real) and not real.is_dir():
            raise UserError(f"{option} {path} is a file; name a directory")
        listed = _listed(real)
        if listed is None and _filled(real, but=".lock"):  # which `esd_peft.io.jobs` may have just put there
            raise UserError(f"{option} {path} holds files that esd_peft did not write; name another directory")
        for name in writes:
            if os.path.lexists(real / name) and name not in (listed or ()):
                raise UserError(f"{option} {path} holds {name}, which esd_peft did not write; name another directory")
        _try_draft(real / "draft" if real.is_dir() else real)


def take_folder(path: Path, option: str = "--output") -> None:
    """Make the folder, or go on with our own. Raises `UserError` as `check_folder` does."""
    check_folder(path, option=option)
    with _said(path, option):
        path.resolve().mkdir(parents=True, exist_ok=True)
        _mark(path.resolve())


def empty_folder(path: Path, option: str = "--output") -> None:
    """Remove what `take_folder` took. Raises `UserError`, and removes nothing, if it holds files of somebody else."""
    _check_own(path, option)
    _remove(path.resolve())


def _filled(folder: Path, but: str = "") -> bool:
    return folder.is_dir() and any(entry.name != but for entry in folder.iterdir())


def _check_own(path: Path, option: str) -> None:
    try:
        other = _foreign(path.resolve(), set(), path.resolve())
    except BlockingIOError:
        raise UserError(f"{option} {path}: another run is writing there; wait for it, or name another directory") from None
    if other:
        name = other.relative_to(path.resolve())
        raise UserError(
            f"{option} {path} holds {name}, which esd_peft did not write and --overwrite does not replace; name another "
            "directory"
        )


def _foreign(folder: Path, listed: set[str], root: Path) -> Path | None:
    """A file in `folder` that this package did not write, if there is one. Raises `BlockingIOError` if a run is at work."""
    if (own := _listed(folder)) is not None:
        listed, root = own, folder
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if found := _foreign(entry, listed, root):
                return found
        elif entry.name != MARK and not {_EVERYTHING, str(entry.relative_to(root))} & listed and not is_lock(entry):
            return entry
    return None


def _listed(folder: Path) -> set[str] | None:
    """What the folder's mark lists; none without one."""
    mark = folder / MARK
    if mark.is_symlink() or not mark.is_file():
        return None
    names: set[str] = set()
    for line in mark.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # a line that a full disk cut off
            names.add(str(json.loads(line)))
    return names


def _mark(folder: Path, names: Iterable[str] = ()) -> None:
    """Add `names` to the list of what this package wrote in `folder`."""
    with (folder / MARK).open("a", encoding="ascii") as file:
        file.writelines(f"{json.dumps(name)}\n" for name in names)


def _check_writable(real: Path) -> None:
    """Try what is to happen to `real` later. Raises `OSError`."""
    _try_draft(real)
    if real.is_file() or _filled(real):
        with _working(real, "old") as old:
            real.rename(old / real.name)  # and back


def _try_draft(real: Path) -> None:
    real.parent.mkdir(parents=True, exist_ok=True)
    remove_left(real)
    with _working(real, "draft"):
        pass


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool, option: str = "--output", private_as: Iterable[Path] = ()) -> Iterator[Path]:
    """A directory to fill; it takes the name `path` when the block ends well and vanishes when it does not.

    Files get the modes that the umask gives; who may not read one of `private_as` may not read them either.
    Raises `UserError` as `check_output` does, and for a full or failing disk.
    """
    check_output(path, overwrite, option=option)
    real = path.resolve()
    try:
        with _working(real, "draft") as draft:
            made = draft / real.name
            made.mkdir()
            yield made
            settle(made, private_as)
            if _filled(real):
                _check_own(path, option)
                with _working(real, "old") as old:
                    real.rename(old / real.name)
                    made.rename(real)
            else:
                made.rename(real)  # an empty directory may be renamed onto
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, real, path, option) from None


@contextlib.contextmanager
def new_file(path: Path, private_as: Iterable[Path] = ()) -> Iterator[Path]:
    """A file of that name to write to; it becomes `path` when the block ends well."""
    real = path.resolve()
    try:
        with _working(real, "draft") as draft:
            yield draft / real.name
            _open_up(draft / real.name, _mode(draft / MARK, private_as))
            if _listed(real.parent) is not None:
                _mark(real.parent, [real.name])
            (draft / real.name).replace(real)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, real, path) from None


def remove_left(path: Path) -> None:
    """Remove the drafts of `path` that no living process holds.

    One that was killed while it replaced `path` may have left the old one in a folder beside it: that comes back.
    """
    for kind in ("old", "draft"):
        for folder in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            if folder.is_symlink() or not folder.is_dir() or not re.fullmatch(r"[a-z0-9_]{8}", folder.name[-8:]):
                continue
            with contextlib.suppress(OSError), locks.hold(folder) as sure:
                if not sure:
                    continue  # without locks nobody knows whose it is
                if not _filled(folder):  # it was killed before the mark was there
                    folder.rmdir()
                elif _EVERYTHING in (_listed(folder) or ()):
                    _clear(folder, path)


@contextlib.contextmanager
def _working(real: Path, kind: str) -> Iterator[Path]:
    """A folder beside `real`, cleared at the end; its lock goes with the process, however that ends."""
    process = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f".{real.name}.{kind}-", dir=real.parent))
    try:
        with locks.hold(folder):
            _mark(folder, [_EVERYTHING])
            yield folder
    finally:
        if os.getpid() == process:  # in a fork of this process it is the parent's
            with contextlib.suppress(OSError):
                _clear(folder, real)


def _clear(folder: Path, real: Path) -> None:
    """Remove a working folder. What was moved there to make room comes back first, if nothing has taken its place."""
    away = folder / real.name
    if folder.name.startswith(f".{real.name}.old-") and os.path.lexists(away) and not os.path.lexists(real):
        away.rename(real)
    _remove(folder)


def _remove(folder: Path) -> None:
    """The mark goes last: whoever is killed in between leaves a folder that is still known as ours."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    shutil.rmtree(folder)


def settle(folder: Path, private_as: Iterable[Path] = ()) -> None:
    """All files in the folder are ours: listed, and with their modes."""
    _mark(folder, [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if not file.is_dir()])
    _open_up(folder, _mode(folder / MARK, private_as))


def _mode(mark: Path, private_as: Iterable[Path]) -> int:
    """Of files: what the umask (or an ACL) gave to a mark, without those who may not read `private_as`."""
    mode = mark.stat().st_mode & 0o666
    for path in private_as:
        readable = path.stat().st_mode
        mode &= ~sum(bits for bits in (0o060, 0o006) if not readable & bits & 0o444)
    return mode


def _open_up(made: Path, mode: int) -> None:
    """Give files their mode, whatever library wrote them, and directories the same with the right to enter them."""
    for path in (made, *made.rglob("*")) if made.is_dir() else (made,):
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextlib.contextmanager
def _said(path: Path, option: str = "--output") -> Iterator[None]:
    """Whatever the system has against `path` as a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: a zero byte
        raise UserError(f"{option} {path} cannot be written: {system_reason(error)}; name a writable directory") from None


def _unwritable(error: Exception, real: Path, path: Path, option: str = "--output") -> Exception:
    """A `UserError` for what went wrong while writing a draft of `path` (a full disk, say); other errors as they are."""
    names = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if names and not any(name.startswith(f"{real.parent / f'.{real.name}.'}") for name in names):
        return error
    reason = error.args[0][0][2] if isinstance(error, shutil.Error) else system_reason(error)
    return UserError(f"{option} {path} cannot be written: {reason}; free some space or name another directory")
