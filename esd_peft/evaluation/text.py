"""The report as plain text and as Markdown."""

import re

from esd_peft.evaluation.result import Evaluation
from esd_peft.evaluation.tables import Table, tables
from esd_peft.io.text import printable_lines, shown

MARKS = {"good": "✓", "partial": "~", "bad": "✗", "unknown": "?"}


def as_text(result: Evaluation) -> str:
    """Return the verdict and the tables for the terminal, without the table of single labels."""
    verdicts = [f"{MARKS[verdict.level]} {verdict.text}" for verdict in result.verdicts]
    texts = [_aligned(table) for table in tables(result) if table.title != "One by one"]
    return "\n\n".join(["\n".join([*verdicts, *result.notes]), *texts])


def _aligned(table: Table) -> str:
    rows = [[table.title, *table.header[1:]], *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def as_markdown(result: Evaluation) -> str:
    """The same as the HTML report, without its images."""
    lines = [f"# What is left of {_escaped(', '.join(result.concepts) or 'it')}", ""]
    lines += [f"- {MARKS[verdict.level]} {_escaped(verdict.text)}" for verdict in result.verdicts]
    lines += [f"- {_escaped(note)}" for note in result.notes]
    lines += ["", f"Suite {_escaped(result.suite)}: {_escaped(result.about)}."]
    for table in tables(result):
        lines += ["", f"## {_escaped(table.title)}", "", _escaped(table.note), ""]
        lines += [_row(table.header), _row(["---"] + ["---:"] * (len(table.header) - 1)), *map(_row, table.rows)]
    lines += ["", "## Command", "", f"    {shown(result.command)}", "", f"esd_peft {result.version}", ""]
    return printable_lines("\n".join(lines))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Prompts and labels are shown as they are: no tags, no table cells, no links or images, on one line."""
    text = " ".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`|\[\]])", r"\\\1", text)
