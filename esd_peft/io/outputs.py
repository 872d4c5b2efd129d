"""Outputs, which appear as a whole or not at all, and never replace an input or foreign files.

Files are written to a temporary sibling folder, a draft, and then renamed. A draft is locked while its process lives; the
next run removes drafts of killed processes. Only files that the same output made before are replaced or removed
(`esd_peft.io.marks`); callers name the kind of output ("an adapter"). Links are followed to their targets.
"""

import contextlib
import glob
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from esd_peft.errors import UserError, system_reason
from esd_peft.io import locks, marks
from esd_peft.io.marks import MARK, filled

Inputs = Iterable[str | Path | None]  # inputs of the command: files, folders, hub ids, None


def check_output(path: Path, kind: str, overwrite: bool, inputs: Inputs = (), option: str = "--output") -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new directory later.

    It is of that kind ("an adapter"), and replaces nothing else. Nor may it be, hold or lie in one of `inputs`, be the
    working directory or a mount point: it is replaced as a whole.
    """
    with _user_errors(path, option):
        real = path.resolve()
        keep_apart(path, inputs, option)
        if real.is_mount():
            raise UserError(f"{option} {path} is a mount point and cannot be replaced; name a directory in it")
        if os.path.lexists(real) and not real.is_dir():
            raise UserError(f"{option} {path} is a file; name a directory")
        if filled(real):
            if not overwrite and marks.kind_of(real) in (None, kind):
                raise UserError(f"{option} {path} is not empty; name another directory or add --overwrite")
            _check_own(path, kind, option)
        _check_writable(real)


def check_new_file(path: Path, kind: str, overwrite: bool, inputs: Inputs = ()) -> None:
    """Raise `UserError` now, before any work, if `path` could not be written as a new file later, or is or lies in an input.

    It is of that kind ("a merged model"), says so in its header (`marks.KEY`), and replaces nothing else.
    """
    with _user_errors(path):
        if path.is_dir():
            raise UserError(f"--output {path} is a directory; name a file in it")
        keep_apart(path, inputs)
        if os.path.lexists(path.resolve()):
            if marks.kind_of(path) != kind:
                raise UserError(f"--output {path} is there and was not written by this command; name another file")
            if not overwrite:
                raise UserError(f"--output {path} is already there; name another file or add --overwrite")
        _check_writable(path.resolve())


def keep_apart(path: Path, inputs: Inputs, option: str = "--output") -> None:
    """Raise `UserError` if the output `path` is, holds or lies in one of `inputs`, or holds the working directory."""
    if path.resolve().name == MARK:
        raise UserError(f"{option} {path} has the name that esd_peft gives its lists of files; choose another one")
    existing = [Path(other) for other in inputs if other is not None and os.path.exists(other)]
    for other in (Path.cwd(), *existing):
        if _within(other, path):
            raise UserError(f"{option} {path} is or holds {other}; name another directory")
    for other in existing:
        if _within(path, other):
            raise UserError(f"{option} {path} lies in {other}, which is read; name another directory")


def _within(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is or lies in `outer`, through any links, mounts and spellings."""
    inner, outer = inner.resolve(), outer.resolve()
    if inner.is_relative_to(outer):
        return True
    return outer.exists() and any(p.exists() and outer.samefile(p) for p in (inner, *inner.parents))


def check_folder(path: Path, kind: str, inputs: Inputs = (), writes: Iterable[str] = (), option: str = "--output") -> None:
    """Raise `UserError` now, before any work, if `path` could not be a folder that is added to: new, empty or of that kind.

    Nor may it be, hold or lie in one of `inputs`, or hold a file that the caller `writes` and that did not come with it.
    """
    with _user_errors(path, option):
        real = path.resolve()
        keep_apart(path, inputs, option)
        if os.path.lexists(real) and not real.is_dir():
            raise UserError(f"{option} {path} is a file; name a directory")
        if filled(real, but=".lock"):  # a lock of `esd_peft.io.jobs`
            _check_kind(path, kind, option)
        listed = marks.recorded(real) or ()
        for name in writes:
            if os.path.lexists(real / name) and name not in listed:
                raise UserError(f"{option} {path} holds {name}, which esd_peft did not write; name another directory")
        _try_draft(real / "draft" if real.is_dir() else real)


def take_folder(path: Path, kind: str, part_of: Path | None = None, option: str = "--output") -> None:
    """Create the folder, or continue with one of that kind; it belongs to the directory `part_of`.

    Raises `UserError` as `check_folder` does.
    """
    check_folder(path, kind, option=option)
    with _user_errors(path, option):
        path.resolve().mkdir(parents=True, exist_ok=True)
        _add_to(part_of, path)
        marks.begin(path.resolve(), kind)


def empty_folder(path: Path, kind: str, option: str = "--output") -> None:
    """Remove the folder that `take_folder` took. Raises `UserError`, and removes nothing, if it has foreign files."""
    _check_own(path, kind, option)
    _remove(path.resolve())


def _add_to(outer: Path | None, path: Path) -> None:
    """Record the directory `path` in the marked directory that contains it."""
    if outer is not None and marks.recorded(outer.resolve()) is not None:
        marks.add(outer.resolve(), [f"{path.resolve().relative_to(outer.resolve()).as_posix()}/"])


def _check_kind(path: Path, kind: str, option: str) -> None:
    found_kind = marks.kind_of(path.resolve())
    if found_kind != kind:
        what = f"{found_kind}, not {kind}" if found_kind else "files that esd_peft did not write"
        raise UserError(f"{option} {path} holds {what}; name another directory")


def _check_own(path: Path, kind: str, option: str) -> None:
    """Raise `UserError` if something there is neither of that kind nor recorded as a part of it."""
    real = path.resolve()
    try:
        other = marks.foreign(real)
    except BlockingIOError:
        raise UserError(f"{option} {path}: another run is writing there; wait for it, or name another directory") from None
    if marks.recorded(real) is not None:
        _check_kind(path, kind, option)
    if other:
        raise UserError(
            f"{option} {path} holds {other.relative_to(real)}, which esd_peft did not write as a part of it and does not "
            "replace; name another directory"
        )


def _check_writable(real: Path) -> None:
    """Try the later replacement of `real`. Raises `OSError`."""
    _try_draft(real)
    if real.is_file() or filled(real):
        with _working(real, "old") as old:
            real.rename(old / real.name)  # and back


def _try_draft(real: Path) -> None:
    real.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(real)
    with _working(real, "draft"):
        pass


@contextlib.contextmanager
def new_directory(
    path: Path,
    kind: str,
    overwrite: bool,
    part_of: Path | None = None,
    option: str = "--output",
    private_as: Iterable[Path] = (),
) -> Iterator[Path]:
    """Yield a directory to fill; it becomes `path` if the block succeeds, and is removed otherwise.

    It is recorded in the directory `part_of`, if given. Files get the modes of the umask, without
    readers who may not read one of `private_as`. Raises `UserError` as `check_output` does, and for a full or failing disk.
    """
    check_output(path, kind, overwrite, option=option)
    real = path.resolve()
    try:
        with _working(real, "draft") as draft:
            new = draft / real.name
            new.mkdir()
            yield new
            marks.begin(new, kind)
            settle(new, private_as)
            _add_to(part_of, path)
            if filled(real):
                _check_own(path, kind, option)
                with _working(real, "old") as old:
                    real.rename(old / real.name)
                    new.rename(real)
            else:
                (real / MARK).unlink(missing_ok=True)  # an empty directory may be renamed onto
                new.rename(real)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, real, path, option) from None


@contextlib.contextmanager
def new_file(path: Path, private_as: Iterable[Path] = (), standalone: bool = False) -> Iterator[Path]:
    """Yield a file to write; it becomes `path` if the block succeeds.

    It is recorded in the marked directory that contains it, unless it is an output by itself (`standalone`). Raises
    `UserError` if a foreign file has that name, and for a full or failing disk.
    """
    real = path.resolve()
    try:
        names = None if standalone else marks.recorded(real.parent)
        if names is not None and real.name not in names and os.path.lexists(real):
            raise UserError(f"--output: {path} is there and esd_peft did not write it; move it away")
        with _working(real, "draft") as draft:
            yield draft / real.name
            _open_up([draft / real.name], _mode(draft / MARK, private_as))
            if names is not None and real.name not in names:
                marks.add(real.parent, [real.name])
            (draft / real.name).replace(real)
    except (OSError, SafetensorError) as error:
        raise _unwritable(error, real, path) from None


def remove_leftovers(path: Path) -> None:
    """Remove the drafts of `path` whose processes are dead.

    A run killed while it replaced `path` may have left the old one in a sibling folder: it is restored.
    """
    for kind in ("old", "draft"):
        for folder in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            with contextlib.suppress(OSError):
                if not marks.is_working(folder, path.name):
                    continue
                with locks.try_lock(folder) as sure:
                    if sure:  # without an effective lock a run may still use it
                        _clear(folder, path)


@contextlib.contextmanager
def _working(real: Path, kind: str) -> Iterator[Path]:
    """Create a locked folder beside `real`, and clear it at the end; the lock ends with the process."""
    process = os.getpid()
    folder = real.with_name(marks.working_name(real.name, kind))
    folder.mkdir(0o700)
    try:
        with locks.try_lock(folder):
            marks.begin_working(folder)
            yield folder
    finally:
        if os.getpid() == process:  # in a fork of this process it is the parent's
            with contextlib.suppress(OSError):
                _clear(folder, real)


def _clear(folder: Path, real: Path) -> None:
    """Remove a working folder. A directory that was put aside there comes back first, if its place is free."""
    away = folder / real.name
    if folder.name.startswith(f".{real.name}.old-") and os.path.lexists(away) and not os.path.lexists(real):
        away.rename(real)
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove the folder, its mark last: after a kill the remaining folder is still recognised as ours."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    shutil.rmtree(folder)


def settle(folder: Path, private_as: Iterable[Path] = (), but: Collection[Path] = ()) -> None:
    """Record all files in the marked folder, except `but`, and set their modes."""
    files = [path for path in sorted(folder.rglob("*")) if path not in but]
    names = [path.relative_to(folder).as_posix() for path in files if not path.is_dir() and path.name != MARK]
    marks.add(folder, sorted({*names} - (marks.recorded(folder) or set())))
    _open_up([folder, *files], _mode(folder / MARK, private_as))


def _mode(mark: Path, private_as: Iterable[Path]) -> int:
    """Return the mode of files: that of the mark (from umask or ACL), without readers who may not read `private_as`."""
    mode = mark.stat().st_mode & 0o666
    for path in private_as:
        readable = path.stat().st_mode
        mode &= ~sum(bits for bits in (0o060, 0o006) if not readable & bits & 0o444)
    return mode


def _open_up(paths: Iterable[Path], mode: int) -> None:
    """Give files their mode, whatever library wrote them, and directories the same with the right to enter them."""
    for path in paths:
        if not path.is_symlink():
            path.chmod(mode | (mode & 0o444) >> 2 if path.is_dir() else mode)


@contextlib.contextmanager
def _user_errors(path: Path, option: str = "--output") -> Iterator[None]:
    """Turn an error of the system about `path` into a `UserError`."""
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
