"""docs/config.md is what the classes of options say today, and says something of each of them."""

import importlib
import re
from pathlib import Path

import pytest

from esd_peft.options.base import groups_of
from esd_peft.options.erase import EraseConfig
from esd_peft.options.merge import MergeConfig
from esd_peft.options.prompts import Concept

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def reference(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("config_reference")


def test_the_committed_page_is_what_the_classes_say(reference):
    assert (DOCS / "config.md").read_text(encoding="utf-8") == reference.page(), "run python docs/config_reference.py"


def test_every_command_is_found(reference):
    found = reference.commands()
    assert found["erase"] is EraseConfig
    assert found["merge_adapter"] is MergeConfig
    sources = [path.read_text(encoding="utf-8") for path in (DOCS.parent / "esd_peft").rglob("*.py")]
    assert len(found) == sum(len(re.findall(r"class \w+Config\(", text)) for text in sources)


@pytest.mark.parametrize("kind", [*groups_of(EraseConfig).values(), MergeConfig, Concept])
def test_every_field_has_a_row_with_an_explanation(kind):
    rows = {cells[1].strip(" `"): cells for line in (DOCS / "config.md").read_text(encoding="utf-8").splitlines()
            if len(cells := re.split(r"(?<!\\)\|", line)) == 6}  # fmt: skip
    for name in kind.model_fields:
        assert rows[name][2].strip(), name
        assert len(rows[name][4].strip()) > 5, name


def test_a_row_has_the_values_and_the_default_of_its_field(reference):
    text = reference.page()
    assert "| `rank` | a whole number ≥ 1, ≤ 1024 |  | Rank of the adapter;" in text
    assert "| `adapter_type` | `lora`, `loha`, `lokr`, `none` | `lora` |" in text
    assert text.count("Read by `trajectories`. |") == 4
    (row,) = (line for line in text.splitlines() if line.startswith("| `guidance_scale` |") and "`layers`" in line)
    assert row.endswith(" Read by `layers`, `denoiser`, `trajectories`. |")
    assert "| `plan` | true, false | `false` |" in text
    assert "| `output` | a path | required | Where the merged pipeline goes" in text
    assert "| `seed` | a whole number ≥ 0 | `0` |" in text
