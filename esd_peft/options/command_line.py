"""Command lines and YAML files for classes of options; mistakes become one sentence and an exit code."""

import contextlib
import difflib
import io
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import tyro
from pydantic import TypeAdapter, ValidationError

from esd_peft.errors import UserError, out_of_memory, system_reason
from esd_peft.io import terminal
from esd_peft.io import text as text_files
from esd_peft.io.text import shown
from esd_peft.options.base import Options, flag, grouped, groups_of, sentence
from esd_peft.runtime import interrupts
from esd_peft.runtime.allocator import avoid_gaps, refused_by_driver
from esd_peft.runtime.failures import first_to_fail

Config = TypeVar("Config", bound=Options)
WIDTH = 110  # columns of a short help


def parse(
    config: type[Config], program: str, argv: list[str] | None = None, presets: Mapping[str, Path] | None = None
) -> Config:
    """The config from the command line; `--preset NAME` and `--config FILE` give defaults (the file's win over the
    preset's), `--print-config` prints YAML and exits.

    Raises:
        UserError: an option or a value that does not fit, in one sentence.
        SystemExit: after `--help`, `--help-all` or `--print-config`.
    """
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if config.usual and not {"-h", "--help"}.isdisjoint(argv):
        print(_short_help(config, program, presets or {}))
        raise SystemExit(0)
    argv = ["--help" if arg == "--help-all" else arg for arg in argv]
    values = _defaults(config, argv, presets or {})
    show = "--print-config" in argv
    argv = [arg for arg in argv if arg != "--print-config"]
    for name in _lists(config):
        if any(re.match(f"{flag(name)}(=|$)", arg) for arg in argv):
            _forget(values, name)  # named anew, not added to
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Config = tyro.cli(  # type: ignore[assignment]
                config,
                args=argv,
                prog=program,
                description=_description(config, presets or {}),
                default=_unchecked(config, values) if values else None,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code:
            raise UserError(_unboxed(said.getvalue())) from None
        raise
    if show:
        print(parsed.to_yaml(), end="")
        raise SystemExit(0)
    return parsed


def _short_help(config: type[Options], program: str, presets: Mapping[str, Path]) -> str:
    """The options that most people need, with the first sentence of what each does."""
    fields = {name: field for kind in (config, *groups_of(config).values()) for name, field in kind.model_fields.items()}
    lines = [f"usage: {program} [OPTIONS]", "", *textwrap.wrap(_description(config, presets), WIDTH), ""]
    for name in config.usual:
        said = " ".join((fields[name].description or "").split())
        first = re.split(r"(?<=[a-z)])[.;:] ", said, maxsplit=1)[0].removesuffix(".")
        default = fields[name].get_default(call_default_factory=True)
        first += f" (default: {default})" if isinstance(default, str | int | Path) and default is not False else ""
        lines += textwrap.wrap(first, WIDTH, initial_indent=f"  {flag(name):<25}", subsequent_indent=" " * 27)
    return "\n".join([*lines, "", "--help-all shows all options."])


def _description(config: type[Options], presets: Mapping[str, Path]) -> str:
    said = f"{config.__doc__} --config FILE reads a YAML file of these options; --print-config prints one."
    return said + (f" --preset NAME sets the options for a kind of concept: {', '.join(presets)}." if presets else "")


def _defaults(config: type[Options], argv: list[str], presets: Mapping[str, Path]) -> dict[str, Any]:
    """Return the defaults of a preset and a file, and take both options out of `argv`."""
    preset = _take_option(argv, "--preset", f"a name: {', '.join(presets)}") if presets else None
    path = _take_option(argv, "--config", "a file")
    if preset is not None and preset not in presets:
        near = difflib.get_close_matches(preset, presets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(presets)}"
        raise UserError(f"--preset {preset} is not known; {hint}")
    values = read_yaml(presets[preset], config) if preset is not None else {}
    groups = groups_of(config)
    for name, value in (read_yaml(Path(path), config) if path else {}).items():
        values[name] = values[name] | value if name in groups and name in values else value
    return values


def read_yaml(path: Path, config: type[Options]) -> dict[str, Any]:
    """The fields in a YAML file, in their groups. Raises `UserError` if it cannot be read or names one that is not there."""
    try:
        values = text_files.read_yaml(path)
    except text_files.UnreadableError as error:
        raise UserError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must be a YAML map of options, as --print-config prints it")
    groups = groups_of(config)
    known = {*config.model_fields, *(name for group in groups.values() for name in group.model_fields)}
    _check_names(path, values, known, config.gone)
    try:
        values = grouped(config, values)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    for name, value in values.items():
        if name not in groups:
            values[name] = _typed(path, config, name, value)
            continue
        if not isinstance(value, dict):
            raise UserError(f"--config {path}: {name} is a group of options; write them below it")
        _check_names(path, value, groups[name].model_fields, config.gone)
        values[name] = {option: _typed(path, groups[name], option, given) for option, given in value.items()}
    return values


def _check_names(path: Path, values: dict[Any, Any], known: Collection[str], gone: Mapping[str, str]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--print-config lists the options"
            if key in gone:
                hint = f"it was of an earlier version: {gone[key]}"
            raise UserError(f"--config {path} has the unknown option {key}; {hint}")


def _typed(path: Path, options: type[Options], name: str, value: Any) -> Any:
    field = options.model_fields[name]
    if get_origin(field.annotation) is list and isinstance(value, str | dict):
        value = [value]
    try:
        kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise UserError(f"--config {path}: {sentence(error, name)}") from None


def _lists(config: type[Options]) -> list[str]:
    """The options that may be given several times."""
    kinds = (config, *groups_of(config).values())
    return [name for kind in kinds for name, field in kind.model_fields.items() if get_origin(field.annotation) is list]


def _forget(values: dict[str, Any], name: str) -> None:
    for group in (values, *(value for value in values.values() if isinstance(value, dict))):
        group.pop(name, None)


def _unchecked(config: type[Config], values: dict[str, Any]) -> Config:
    """Fill in defaults without validating: the command line may still change them, and is validated afterwards."""
    groups = groups_of(config)
    made: Any = {name: _unchecked(groups[name], value) if name in groups else value for name, value in values.items()}
    return config.model_construct(**made)


def _take_option(argv: list[str], name: str, kind: str) -> str | None:
    for i, arg in enumerate(argv):
        if arg == name:
            if i + 1 == len(argv):
                raise UserError(f"{name} needs {kind}")
            value = argv[i + 1]
            del argv[i : i + 2]
            return value
        if arg.startswith(name + "="):
            del argv[i]
            return arg.removeprefix(name + "=")
    return None


def _unboxed(text: str) -> str:
    """The message in tyro's box, on one line."""
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))
    return " ".join(lines[:rule] or text.split()).removesuffix(".") + "; see --help"


NO_MEMORY = "this machine has too little memory for that; take smaller numbers or a smaller model"


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2, and so does too little
    memory."""
    if transformers := sys.modules.get("transformers"):  # a command that loads models has imported it
        transformers.utils.logging.disable_progress_bar()
    avoid_gaps()
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
        refused = refused_by_driver(error)
        if refused is None and not out_of_memory(error):
            raise
        said, code = f"error: {refused or NO_MEMORY}", 2
    except OSError as error:  # what no reader or writer foresaw; without a name it is no file's
        if error.filename is None:
            raise
        file, reason = shown(str(error.filename)), system_reason(error)
        said, code = f"error: {file} cannot be used ({reason}); see to your rights there, or name another", 2
    if first_to_fail():
        with terminal.forgiving_streams():
            print(said, file=sys.stderr)
    sys.exit(code)
