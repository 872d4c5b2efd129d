"""Untrusted text, YAML, JSON and CSV files: their content, or one kind of error.

Only regular files are read, so that no pipe or device blocks, and only up to a size that fits their purpose.
"""

import csv
import io
import itertools
import json
import os
import stat
import unicodedata
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from esd_peft.errors import system_reason

_FLAGS = os.O_RDONLY  # and where the system knows it: a pipe without a writer opens at once, lines end as they do
for _flag in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"):
    _FLAGS |= getattr(os, _flag, 0)
_LARGEST = 64 * 2**20  # bytes
_LARGEST_YAML = 2**18  # whose parser takes a second for that
_MOST_ROWS = 10**6  # of CSV, of which each takes hundreds of bytes


class UnreadableError(Exception):
    """Why the file gives no values. Whoever reads it says so in a `UserError` that names the option."""

    def __init__(self, reason: str) -> None:
        """One line, of no more of the file than helps."""
        super().__init__(" ".join(reason.split())[:300])


def read_bytes(path: Path, largest: int) -> bytes:
    """The file's content. Raises `UnreadableError` unless it is a regular file of so many bytes at most."""
    try:
        with open(os.open(path, _FLAGS), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableError("it is no regular file")
            content = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UnreadableError(system_reason(error)) from None
    if len(content) > largest:
        raise UnreadableError(f"it is larger than {largest // 2**10} KiB")
    return content


def read_text(path: Path | Traversable, largest: int = _LARGEST) -> str:
    """The file's text, without a byte order mark. Raises `UnreadableError` for whatever is wrong with it."""
    content = read_bytes(path, largest) if isinstance(path, Path) else path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"it is not UTF-8: {error}") from None


def shown(text: str) -> str:
    """Return the text on one line; invisible characters and invalid Unicode become escapes such as \\x1b."""
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escape(c) for c in text)


def printable_lines(text: str) -> str:
    """The same of a text of several lines."""
    return "\n".join(map(shown, text.split("\n")))


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def read_lines(path: Path | Traversable) -> list[str]:
    """The lines of a list: without blank ones and those that begin with #. Raises `UnreadableError`."""
    lines = (line.strip() for line in read_text(path).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns, and the rows by them: each cell is there, if empty. Raises `UnreadableError`."""
    try:
        # strict: otherwise a quote that is not closed takes the rows below it into its cell
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), restkey="", restval="", strict=True)
        columns = list(reader.fieldnames or ())
        rows = [{k: v for k, v in row.items() if k} for row in itertools.islice(reader, _MOST_ROWS + 1)]
    except csv.Error as error:
        raise UnreadableError(f"it is not CSV after line {reader.line_num} ({error}): close its quotes") from None
    _check_once(filter(None, columns))
    if len(rows) > _MOST_ROWS:
        raise UnreadableError(f"it has more than {_MOST_ROWS:,} rows")
    return columns, rows


def read_json(path: Path, largest: int = _LARGEST) -> Any:
    """The file's values. Raises `UnreadableError` for whatever is wrong with it."""
    return parse_json(read_text(path, largest))


def parse_json(text: str | bytes) -> Any:
    """Values from JSON that can be written again. Raises `UnreadableError`."""
    try:
        values = json.loads(text, object_pairs_hook=_map_of)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair could not be printed or saved
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not JSON: {error}") from None
    return values


def read_yaml(path: Path | Traversable) -> Any:
    """The file's values. Raises `UnreadableError` for whatever is wrong with it."""
    return parse_yaml(read_text(path, _LARGEST_YAML))


def parse_yaml(text: str) -> Any:
    """Values from YAML. Raises `UnreadableError`."""
    try:
        return yaml.load(text, _PlainLoader)
    except UnreadableError:
        raise
    except Exception as error:  # PyYAML also lets errors of dates, numbers and booleans pass
        raise UnreadableError(f"it is not YAML: {error or type(error).__name__}") from None


def _map_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once(key for key, _ in pairs)
    return dict(pairs)


def _check_once(keys: Iterable[Any]) -> None:
    """Raise `UnreadableError` for a key that stands there twice: otherwise the last value would win without a word."""
    seen = set()
    for key in keys:
        if key in seen:
            raise UnreadableError(f"it says {shown(str(key))[:100]} twice; say it once")
        seen.add(key)


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: ten lines of them say more than fits any memory, and no option needs one. Keys stand there once."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "write the value again: *aliases are not read", None)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value]
            if any(key.tag == "tag:yaml.org,2002:merge" for key in keys):
                raise yaml.constructor.ConstructorError(None, None, "write the values themselves: << is not read", None)
            _check_once(self.construct_object(key, deep=True) for key in keys)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        value.encode()  # as for JSON
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        str(value)  # Python prints no number of more than 4300 digits
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
