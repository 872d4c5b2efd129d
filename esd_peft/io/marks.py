"""Ownership marks, read before anything is replaced or removed: did this very output make it?

Every directory of this package has a mark, `.esd_peft`, of JSON lines. The first line is its kind ("an adapter", "the
checkpoint of erased"). The others are the files written in it and, with a slash at the end, marked directories that belong
to it. A file that is an output by itself has its kind in its header. Anything with another mark, or none, is foreign,
whatever its name: other outputs of this package are, too.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from os.path import isfile, islink  # False for inaccessible paths, for which the methods of Path raise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from esd_peft.io.jobs import is_lock
from esd_peft.io.text import UnreadableError, parse_json, read_json

MARK = ".esd_peft"
_NEW = f"{MARK}.new"  # a mark that is being written
KEY = "esd_peft.made"  # in the header of a safetensors file, and in JSON
_DIGEST = "esd_peft.sha256"  # in JSON, which people edit: of the rest
_DRAFT = "a draft"
_WORKING = re.compile(r"\.(.+)\.(draft|old)-[0-9a-f]{16}", re.DOTALL)


def kind_of(path: Path) -> str | None:
    """Return the kind that a directory or file declares; None if it is not of this package."""
    if not isfile(path):
        return _read(path)[0]
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get(KEY)
    except (SafetensorError, OSError):
        return _json_kind(path)


def signed(values: dict[str, Any], kind: str) -> dict[str, Any]:
    """Sign the values of a JSON file that is an output by itself; any later change voids the signature."""
    values = {**values, KEY: kind}
    return {**values, _DIGEST: _digest(values)}


def _json_kind(file: Path) -> str | None:
    try:
        values = read_json(file)
    except UnreadableError:
        return None
    if not isinstance(values, dict) or values.pop(_DIGEST, None) != _digest(values):
        return None
    kind = values.get(KEY)
    return kind if isinstance(kind, str) else None


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def recorded(folder: Path) -> set[str] | None:
    """Return the files recorded in the mark of the directory; None without a mark."""
    kind, names = _read(folder)
    return None if kind is None else names


def _read(folder: Path) -> tuple[str | None, set[str]]:
    mark = folder / MARK
    if islink(mark) or not isfile(mark):
        return None, set()
    lines: list[Any] = []
    for line in mark.read_bytes().splitlines():
        with contextlib.suppress(UnreadableError):  # a line that a full disk cut off
            lines.append(parse_json(line))
    if not lines or not isinstance(lines[0], dict) or not isinstance(lines[0].get("made"), str):
        return None, set()
    return lines[0]["made"], {line for line in lines[1:] if isinstance(line, str)}


def begin(folder: Path, kind: str) -> None:
    """Mark the directory, which is empty or has the same mark, as `kind`."""
    if kind_of(folder) == kind:
        return
    try:
        _write(folder / MARK, [{"made": kind}])
    except OSError:
        (folder / MARK).unlink(missing_ok=True)
        raise


def add(folder: Path, names: Iterable[str]) -> None:
    """Record files that were, or will be, written in the directory."""
    text = "".join(f"{json.dumps(name)}\n" for name in names)
    with (folder / MARK).open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":  # a line that a full disk cut off
            text = "\n" + text
        file.write(text.encode())


def drop(folder: Path, names: Iterable[str]) -> None:
    """Remove files from the record: later files of these names are not of this package."""
    kind, recorded_names = _read(folder)
    if kind is None or not recorded_names & {*names}:
        return
    new = folder / _NEW
    with contextlib.suppress(OSError):  # on a full disk they stay on the list, which does no harm
        _write(new, [{"made": kind}, *sorted(recorded_names - {*names})])
        new.replace(folder / MARK)


def _write(mark: Path, lines: Iterable[Any]) -> None:
    with mark.open("w", encoding="ascii") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def foreign(folder: Path) -> Path | None:
    """Return a file in a directory of ours that this package did not write; None if there is none.

    Raises `BlockingIOError` if another run writes there.
    """
    return next(_foreign(folder, recorded(folder) or set(), folder), None)


def _foreign(folder: Path, names: set[str], root: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(root).as_posix()
        if entry.is_dir() and not entry.is_symlink():
            if is_working(entry):
                continue
            inner = recorded(entry)
            if inner is None:
                yield from _foreign(entry, names, root)
            elif f"{name}/" in names:
                yield from _foreign(entry, inner, entry)
            else:
                yield entry
        elif entry.name not in (MARK, _NEW) and name not in names and not is_lock(entry):
            yield entry


def filled(folder: Path, but: str = "") -> bool:
    """Return whether the directory exists and has content other than `but` that could be lost.

    An empty mark, left by a killed run, does not count.
    """
    if not folder.is_dir():
        return False
    names = (entry for entry in folder.iterdir() if entry.name != but)
    return any(entry.name != MARK or not isfile(entry) or entry.stat().st_size for entry in names)


def working_name(name: str, kind: str) -> str:
    """Return a name for the directory in which `name` is written (kind "draft") or put aside ("old")."""
    return f".{name}.{kind}-{secrets.token_hex(8)}"


def begin_working(folder: Path) -> None:
    """Mark a new directory as a draft, which is filled, emptied and removed as a whole."""
    begin(folder, _DRAFT)


def is_working(folder: Path, name: str | None = None) -> bool:
    """Return whether a directory is a draft (of `name`, if given), in use or left by a killed run."""
    found = _WORKING.fullmatch(folder.name)
    if not found or (name is not None and found[1] != name) or folder.is_symlink() or not folder.is_dir():
        return False
    return not filled(folder) or kind_of(folder) == _DRAFT  # a killed run may have left no mark
