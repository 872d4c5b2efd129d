"""Every command of this package that a page gives in a block of its own is one that its command line takes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from esd_peft.options.command_line import parse
from esd_peft.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The words after `python -m esd_peft.`, of the commands in `sh` blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [match for line in lines for match in re.findall(r"python -m esd_peft\.([^'&>|;]+)", line)]
    return [shlex.split(command, comments=True) for command in found]


@pytest.fixture
def classes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("config_reference").commands()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_in_the_pages_are_parsed(page, classes, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        name, options = words[0], words[1:]
        if name == "study":
            name, options = f"study {options[0]}", options[1:]
        config = classes[name]
        if "mine.yaml" in options or "$SLURM_ARRAY_TASK_ID" in " ".join(options):
            continue  # a file of the reader's
        options = [option for option in options if option != "--print-config"]  # it ends the process
        parse(config, name, options, PRESETS if name == "erase" else None)
