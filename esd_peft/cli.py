"""From a class of options to a command line and a YAML file, and from mistakes to one sentence each."""

import contextlib
import difflib
import io
import re
import reprlib
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_origin

import transformers
import tyro
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, ValidationInfo, field_validator

from esd_peft.errors import UserError, out_of_memory
from esd_peft.io import terminal
from esd_peft.io import text as text_files
from esd_peft.runtime import distributed, interrupts

Config = TypeVar("Config", bound="CommandConfig")
_LONGEST = 4000  # characters; names of files have 255 bytes at most
_PROMPTS = ("concept", "erase_from", "map_to", "preserve", "question", "low", "high")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200


class CommandConfig(BaseModel):
    """What all commands' options share. Raises `UserError` for a value that does not fit its field."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(_sentence(error)) from None

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Names and prompts are printed, go into files and are looked for on disks: what cannot is refused at once."""
        for text in _texts(value):
            _check_text(text, is_name=info.field_name not in _PROMPTS)
        return value

    def to_yaml(self) -> str:
        """The fields as YAML that `--config` reads."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, BaseModel):
        yield from _texts([*vars(value).values()])


def _check_text(text: str, is_name: bool) -> None:
    """Raise `ValueError` for what is no prompt, or cannot be the name of a file."""
    if odd := [char for char in text if unicodedata.category(char) in ("Cc", "Cs")]:
        raise ValueError(f"{odd[0]!a} is no character of a name or prompt; leave it out")
    if len(text) > _LONGEST or (is_name and any(len(part.encode()) > 255 for part in text.split("/"))):
        raise ValueError("longer than any name or prompt; shorten it")
    try:
        Path(text).resolve()
    except RuntimeError:
        raise ValueError("a link in a circle of links; name another file") from None


def parse(config: type[Config], command: str, argv: list[str] | None = None) -> Config:
    """The config from the command line; `--config FILE` gives defaults, `--print-config` prints YAML and exits.

    Raises:
        UserError: an option or a value that does not fit, in one sentence.
        SystemExit: after `--help` or `--print-config`.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    path = _take_option(argv, "--config")
    show = "--print-config" in argv
    argv = [arg for arg in argv if arg != "--print-config"]
    values = read_yaml(Path(path), config) if path else {}
    for name, field in config.model_fields.items():
        if get_origin(field.annotation) is list and any(re.match(f"--{name}(=|$)", arg) for arg in argv):
            values.pop(name, None)  # named anew, not added to
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Config = tyro.cli(  # type: ignore[assignment]
                config,
                args=argv,
                prog=f"python -m esd_peft.{command}",
                description=f"{config.__doc__} --config FILE reads a YAML file of these options; --print-config prints one.",
                default=config.model_construct(**values) if values else None,
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_unboxed(said.getvalue())) from None
        raise
    if show:
        print(parsed.to_yaml(), end="")
        raise SystemExit(0)
    return parsed


def read_yaml(path: Path, config: type[CommandConfig]) -> dict[str, Any]:
    """The fields in a YAML file. Raises `UserError` if it cannot be read or names a field that is not there."""
    try:
        values = text_files.read_yaml(path)
    except text_files.UnreadableError as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must be a YAML map of options, as --print-config prints it")
    for key in values:
        if key not in config.model_fields:
            near = difflib.get_close_matches(str(key), config.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else "--print-config lists the options"
            raise UserError(f"--config {path} has the unknown option {key}; {hint}")
        try:
            values[key] = _typed(config.model_fields[key].annotation, values[key])
        except ValidationError as error:
            raise UserError(f"--config {path}: {_sentence(error, key)}") from None
    return values


def _typed(annotation: Any, value: Any) -> Any:
    if get_origin(annotation) is list and isinstance(value, str | dict):
        value = [value]
    return TypeAdapter(annotation).validate_python(value)


def _take_option(argv: list[str], name: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == name:
            if i + 1 == len(argv):
                raise UserError(f"{name} needs a file")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if arg.startswith(name + "="):
            del argv[i]
            return arg.removeprefix(name + "=")
    return None


def _sentence(error: ValidationError, field: str | None = None) -> str:
    """The first problem pydantic found, naming the option (of `field`, if given) as the command line does."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if field is None and not first["loc"]:
        return message
    where = [part for part in ([field] if field else []) + list(first["loc"]) if isinstance(part, str)]
    option = " ".join(["--" + where[0].replace("_", "-"), *where[1:]])
    if first["type"] == "extra_forbidden":
        return f"{option} is not an option"
    if first["type"] == "missing":
        return f"{option} is missing"
    message = message[0].lower() + message[1:]
    return f"{option}: {message}" + ("" if first["input"] in ([], "", None) else f" (got {_SHORT.repr(first['input'])})")


def _unboxed(text: str) -> str:
    """The message in tyro's box, on one line."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return " ".join(lines[:rule] or text.split()).removesuffix(".") + "; see --help"


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2, and so does too little
    memory."""
    transformers.utils.logging.disable_progress_bar()
    interrupts.at_once()
    try:
        with terminal.forgiving_streams():
            main()
        return
    except UserError as error:
        said, code = f"error: {error}", 2
    except KeyboardInterrupt as why:
        said, code = f"interrupted {why}" if why.args else "interrupted: nothing unfinished was kept", 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said, code = "error: this machine has too little memory for that; take smaller numbers or a smaller model", 2
    if distributed.first_to_fail():
        with terminal.forgiving_streams():
            print(said, file=sys.stderr)
    sys.exit(code)


def parse_bytes(text: str) -> int:
    """`12GiB`, `12 GB`, `800M` (MiB), `1000000`: bytes. Raises `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write 12GiB, for example")
    step = 1000 if (found[3] or "").lower() == "b" else 1024
    return int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " "))
