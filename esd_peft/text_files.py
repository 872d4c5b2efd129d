"""YAML and JSON files that anybody may have written: their values, or one kind of error."""

import json
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml


class UnreadableError(Exception):
    """Why the file gives no values. Whoever reads it says so in a `UserError` that names the option."""

    def __init__(self, reason: str) -> None:
        """One line, of no more of the file than helps."""
        super().__init__(" ".join(reason.split())[:300])


def read_json(path: Path) -> Any:
    """The file's values. Raises `UnreadableError` for whatever is wrong with it."""
    return parse_json(_text(path))


def parse_json(text: str | bytes) -> Any:
    """Values from JSON that can be written again. Raises `UnreadableError`."""
    try:
        values = json.loads(text)
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair could not be printed or saved
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"it is not JSON: {error}") from None
    return values


def read_yaml(path: Path | Traversable) -> Any:
    """The file's values. Raises `UnreadableError` for whatever is wrong with it."""
    text = _text(path)
    try:
        return yaml.load(text, _PlainLoader)
    except Exception as error:  # beside its own kinds, PyYAML lets pass what dates, numbers and booleans raise
        raise UnreadableError(f"it is not YAML: {error or type(error).__name__}") from None


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: ten lines of them say more than fits any memory, and no option needs one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "write the value again: *aliases are not read", None)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        value.encode()  # as for JSON
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        str(value)  # Python prints no number of more than 4300 digits
        return value


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def _text(path: Path | Traversable) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, not UTF-8, a name with a zero byte
        raise UnreadableError(str(error)) from None
