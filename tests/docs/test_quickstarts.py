"""docs/quickstarts.md is what the planner says today."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plans(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("plans")


def test_a_model_planned_anew_has_its_section_and_its_rows(plans):
    found = plans.entries("SD 1.5")
    page, table = (file.read_text(encoding="utf-8") for file in (plans.PAGE, plans.TABLE))
    assert plans.section("SD 1.5", found) in page, "run python benchmarks/plans.py"
    assert "\n".join(plans.rows("SD 1.5", found)) in table


def test_the_page_has_a_command_or_a_refusal_for_each_model_and_card(plans):
    page = plans.PAGE.read_text(encoding="utf-8")
    assert page.startswith(plans.INTRODUCTION)
    assert list(plans.SOURCES) == list(plans.MODELS)
    for name in plans.MODELS:
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        commands = [line for line in section.splitlines() if line.startswith("python -m")]
        assert all(f"--model {plans.SOURCES[name]} " in command for command in commands)
        refused = [card for card in plans.CARDS if f"# {card}: refused, " in section]
        fits = [card for card in plans.CARDS if f"--memory-budget {plans.CARDS[card]}\n" in section]
        assert sorted(refused + fits) == sorted(plans.CARDS)
        assert len(commands) == len(fits)
