"""The base of all classes of options: a field is a command-line flag, a key in YAML and an argument in Python.

A command's config is made of groups, each the class of the room that reads it. In YAML the groups are nested; on the
command line their fields are flat, and in Python either will do.
"""

import re
import reprlib
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

import tyro
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic.fields import FieldInfo

from esd_peft.errors import UserError
from esd_peft.io.paths import why_closed

_LONGEST = 4000  # characters; names of files have 255 bytes at most
_PROMPTS = ("concept", "erase_from", "map_to", "preserve", "validation_prompt", "question", "low", "high")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200

LEFT_OUT: Any = None  # the value of an option that has none of its own: `esd_peft.erasure.defaults.resolve` replaces it
Value = TypeVar("Value")
if TYPE_CHECKING:
    Auto = Annotated[Value, "auto"]
else:

    class Auto:
        """`Auto[int]`: an option that may be left out. After `esd_peft.erasure.defaults.resolve` it has a value."""

        def __class_getitem__(cls, kind: Any) -> Any:
            return Annotated[kind | None, cls, tyro.conf.arg(help_behavior_hint="(default: automatic)")]


@dataclass(frozen=True)
class ReadBy:
    """The values of `--method` that read an option; every method reads an option without this mark."""

    methods: tuple[str, ...]

    def __init__(self, *methods: str) -> None:
        object.__setattr__(self, "methods", methods)


def readers(field: FieldInfo) -> tuple[str, ...]:
    """The methods that read an option; none: all of them."""
    return next((note.methods for note in field.metadata if isinstance(note, ReadBy)), ())


class Options(BaseModel):
    """A group of options, or a command's config. Raises `UserError` for a value that does not fit its field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
    gone: ClassVar[Mapping[str, str]] = {}  # options of earlier versions, and what to do instead
    usual: ClassVar[tuple[str, ...]] = ()  # the options that `--help` shows; left empty: all

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**grouped(type(self), values))
        except ValidationError as error:
            raise UserError(sentence(error)) from None

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Names and prompts are printed, go into files and are looked for on disks: what cannot is refused at once."""
        for text in _texts(value):
            check_text(text, is_name=info.field_name not in _PROMPTS)
        return value

    def replace(self, **values: Any) -> Self:
        """A copy with other values for some fields, of itself or of its groups, which are not checked again."""
        nested = grouped(type(self), values)
        for name, value in nested.items():
            if name in groups_of(type(self)) and isinstance(value, dict):
                nested[name] = getattr(self, name).replace(**value)
        return self.model_copy(update=nested)

    def to_yaml(self) -> str:
        """The fields as YAML that `--config` reads, without those that the method does not read."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @model_serializer(mode="wrap")
    def _without_unread(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out options for some methods only that have no value: this method does not read them."""
        fields = type(self).model_fields
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if value is not None or not readers(fields[name])}

    def flat(self) -> dict[str, Any]:
        """Return the options by name, without the groups, as JSON values."""
        values = self.model_dump(mode="json")
        groups = groups_of(type(self))
        own = {name: value for name, value in values.items() if name not in groups}
        return own | {name: value for group in groups for name, value in values[group].items()}


def flag(name: str) -> str:
    """An option as the command line spells it."""
    return "--" + name.replace("_", "-")


def groups_of(kind: type[Options]) -> dict[str, type[Options]]:
    """The fields of a config that are groups, and their classes."""
    kinds = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: group for name, group in kinds.items() if isinstance(group, type) and issubclass(group, Options)}


def grouped(kind: type[Options], values: dict[str, Any]) -> dict[str, Any]:
    """`values` with options that stand alone put into the groups that they belong to.

    Raises `UserError` for one that is given twice, alone and in its group.
    """
    groups = groups_of(kind)
    homes = {name: group for group, options in groups.items() for name in options.model_fields}
    found = {name: value for name, value in values.items() if name not in homes or name in kind.model_fields}
    for name in values.keys() - found.keys():
        group = found.setdefault(homes[name], {})
        if not isinstance(group, dict):
            raise UserError(f"{homes[name]} is a group of options, {flag(name)} among them; write them below it")
        if name in group:
            raise UserError(f"{flag(name)} is given twice, alone and in the group {homes[name]}; give it once")
        found[homes[name]] = group | {name: values[name]}
    return found


def sentence(error: ValidationError, field: str | None = None) -> str:
    """The first problem pydantic found, naming the option (of `field`, if given) as the command line does."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if field is None and not first["loc"]:
        return message
    where = [part for part in ([field] if field else []) + list(first["loc"]) if isinstance(part, str)]
    option = " ".join([flag(where[0]), *where[1:]])
    if first["type"] == "extra_forbidden":
        return f"{option} is not an option"
    if first["type"] == "missing":
        return f"{option} is missing"
    message = message[0].lower() + message[1:]
    return f"{option}: {message}" + ("" if first["input"] in ([], "", None) else f" (got {_SHORT.repr(first['input'])})")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, BaseModel) and not isinstance(value, Options):  # a group has looked at its own
        yield from _texts([*vars(value).values()])


def is_blank(text: str) -> bool:
    """Return whether the text is invisible: spaces, also of no width, and no letter, number, symbol or punctuation."""
    kinds = [unicodedata.category(char) for char in text]
    return not any(kind[0] in "LNSP" or kind == "Cs" for kind in kinds)  # half a character is seen, as a mistake


def check_text(text: str, is_name: bool) -> None:
    """Raise `ValueError` for what is no prompt, or cannot be the name of a file."""
    if odd := [char for char in text if unicodedata.category(char) in ("Cc", "Cs")]:
        raise ValueError(f"{odd[0]!a} is no character of a name or prompt; leave it out")
    if len(text) > _LONGEST or (is_name and any(len(part.encode()) > 255 for part in text.split("/"))):
        raise ValueError("longer than any name or prompt; shorten it")
    if not is_name:
        return
    try:
        Path(text).resolve()
    except RuntimeError:
        raise ValueError("a link in a circle of links; name another file") from None
    if reason := why_closed(text):
        raise ValueError(f"you may not look there ({reason}); name another one, or have its rights changed")


def parse_bytes(text: str) -> int:
    """`12GiB`, `12 GB`, `800M` (MiB), `1000000`: bytes. Raises `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write 12GiB, for example")
    step = 1000 if (found[3] or "").lower() == "b" else 1024
    return int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " "))
