"""Writes docs/config.md: every field of every command, from the classes that are the command line.

python docs/config_reference.py
"""

from pathlib import Path
from typing import Any

from esd_peft.options.base import Options, groups_of, readers
from esd_peft.options.commands import COMMANDS
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "config.md"
INTRODUCTION = """# Every option of every command

Written by `python docs/config_reference.py` from the classes of options; do not edit it.

Each option has one name in three places: `--learning-rate` on the command line is `learning_rate` in the YAML file that
`--config` reads, and in Python. A value that may be true or false is `--plan` or `--no-plan` on the command line; one that
may be given several times is a list in YAML. `--print-config` prints all of a command's options as YAML. Where the default
is empty, the explanation says what happens if the option is left out.

The options of `erase` come in groups. In YAML they are nested in these (`training: {learning_rate: 0.001}`), as
`--print-config` and the `config.yaml` beside an adapter have them; on the command line, and in Python, they need no group.
An option that some values of `--method` do not read says which ones read it, and is refused with the others.
"""


def commands() -> dict[str, type[Options]]:
    """The class of options of each command, those of the study's last."""
    return COMMANDS | {"study make": MakeStudyConfig, "study analyse": AnalyseStudyConfig}


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for command, kind in commands().items():
        parts.append(f"## python -m esd_peft.{command}\n\n{kind.__doc__}\n")
        groups = groups_of(kind)
        schema = kind.model_json_schema()
        schema["properties"] = {name: field for name, field in schema["properties"].items() if name not in groups}
        if schema["properties"]:
            parts.append(_table(schema))
        for name, group in groups.items():
            parts += _section(f"`{name}`", _with_methods(group))
    return "\n".join(parts)


def _with_methods(group: type[Options]) -> dict[str, Any]:
    """The schema of a group, whose options say which methods read them where not all do."""
    schema = group.model_json_schema()
    for name, field in group.model_fields.items():
        if known := readers(field):
            methods = f"Read by {', '.join(f'`{method}`' for method in known)}."
            schema["properties"][name]["description"] = f"{field.description} {methods}"
    return schema


def _section(title: str, schema: dict[str, Any]) -> list[str]:
    """A group, and what its options are made of."""
    parts = [f"### {title}\n\n{schema['description']}\n\n{_table(schema)}"]
    for name, part in schema.get("$defs", {}).items():
        parts += _section(name, part)
    return parts


def _table(schema: dict[str, Any]) -> str:
    rows = ["| option | values | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _default(field)
        said = " ".join(field["description"].split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {_values(field)} | {default} | {said} |")
    return "\n".join(rows) + "\n"


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field: dict[str, Any]) -> str:
    """What a field takes, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"] if part.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return f"a {field['$ref'].rpartition('/')[2]}"
    if field["type"] == "array":
        return f"{_values(field['items'])}; several"
    kinds = {"boolean": "true, false", "integer": "a whole number", "number": "a number", "string": "text"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]:g}" for key, sign in signs.items() if field.get(key, 2**63) < 2**63]
    kind = "a path" if field.get("format") == "path" else kinds[field["type"]]
    return " ".join([kind, ", ".join(bounds)]).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
