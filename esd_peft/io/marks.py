"""Whose is it? The one question before anything is replaced or removed: did this very output make it?

A directory that this package makes holds a mark, `.esd_peft`, of JSON lines. The first says what the directory is ("an
adapter", "the checkpoint of erased"), the others which files were written in it and, with a slash at the end, which
directories with marks of their own go with it. A file that is an output by itself says in its own header what it is. What
says something else, or nothing, is somebody else's, whatever its name: another output of this package is that too.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from os.path import isfile, islink  # false for what cannot be looked at, where those of Path raise
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


def made_as(path: Path) -> str | None:
    """What a directory or a file says it is; none if that is nothing of this package."""
    if not isfile(path):
        return _read(path)[0]
    try:
        with safe_open(path, framework="pt") as opened:
            return (opened.metadata() or {}).get(KEY)
    except (SafetensorError, OSError):
        return _json_made_as(path)


def signed(values: dict[str, Any], made: str) -> dict[str, Any]:
    """The values of a JSON file that is an output by itself, so that it says what it is, until somebody changes it."""
    values = {**values, KEY: made}
    return {**values, _DIGEST: _digest(values)}


def _json_made_as(file: Path) -> str | None:
    try:
        values = read_json(file)
    except UnreadableError:
        return None
    if not isinstance(values, dict) or values.pop(_DIGEST, None) != _digest(values):
        return None
    made = values.get(KEY)
    return made if isinstance(made, str) else None


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def listed(folder: Path) -> set[str] | None:
    """What was written in the directory; none without a mark."""
    made, names = _read(folder)
    return None if made is None else names


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


def begin(folder: Path, made: str) -> None:
    """The directory, which is empty or says so already, is `made` from now on."""
    if made_as(folder) == made:
        return
    try:
        _write(folder / MARK, [{"made": made}])
    except OSError:
        (folder / MARK).unlink(missing_ok=True)
        raise


def add(folder: Path, names: Iterable[str]) -> None:
    """These were written in the directory, or are about to be."""
    text = "".join(f"{json.dumps(name)}\n" for name in names)
    with (folder / MARK).open("a+b") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":  # a line that a full disk cut off
            text = "\n" + text
        file.write(text.encode())


def drop(folder: Path, names: Iterable[str]) -> None:
    """These were removed: what gets such a name later is not this package's."""
    made, known = _read(folder)
    if made is None or not known & {*names}:
        return
    new = folder / _NEW
    with contextlib.suppress(OSError):  # on a full disk they stay on the list, which does no harm
        _write(new, [{"made": made}, *sorted(known - {*names})])
        new.replace(folder / MARK)


def _write(mark: Path, lines: Iterable[Any]) -> None:
    with mark.open("w", encoding="ascii") as file:
        file.writelines(f"{json.dumps(line)}\n" for line in lines)


def foreign(folder: Path) -> Path | None:
    """Something in a directory of ours that did not come there with it; none if there is nothing of the kind.

    Raises `BlockingIOError` if a run is at work there.
    """
    return next(_foreign(folder, listed(folder) or set(), folder), None)


def _foreign(folder: Path, names: set[str], root: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(root).as_posix()
        if entry.is_dir() and not entry.is_symlink():
            if is_working(entry):
                continue
            inner = listed(entry)
            if inner is None:
                yield from _foreign(entry, names, root)
            elif f"{name}/" in names:
                yield from _foreign(entry, inner, entry)
            else:
                yield entry
        elif entry.name not in (MARK, _NEW) and name not in names and not is_lock(entry):
            yield entry


def filled(folder: Path, but: str = "") -> bool:
    """Whether there is a directory with something in it (`but` for that name) that could be lost: a mark without a word, of
    a killed run, could not."""
    if not folder.is_dir():
        return False
    names = (entry for entry in folder.iterdir() if entry.name != but)
    return any(entry.name != MARK or not isfile(entry) or entry.stat().st_size for entry in names)


def working_name(name: str, kind: str) -> str:
    """A name for the directory in which `name` is written (kind "draft") or put aside ("old")."""
    return f".{name}.{kind}-{secrets.token_hex(8)}"


def begin_working(folder: Path) -> None:
    """The new directory is for what is being written: filled, emptied and removed as a whole."""
    begin(folder, _DRAFT)


def is_working(folder: Path, name: str | None = None) -> bool:
    """Whether a directory is one for what is being written (of that `name`, if given), or was, as a killed run left it."""
    found = _WORKING.fullmatch(folder.name)
    if not found or (name is not None and found[1] != name) or folder.is_symlink() or not folder.is_dir():
        return False
    return not filled(folder) or made_as(folder) == _DRAFT  # it may have been killed before the mark was there
