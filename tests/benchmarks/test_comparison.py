"""The tables of the comparison: over the same runs for every row, and what the README shows of them."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("comparison")


def made(concept: str, left: float, lost: float, seed: int = 0) -> dict:
    def rates(erased: bool, after: float) -> dict:
        after_all = {"share": after, "interval": [after - 0.1, after + 0.1]}
        found = {"title": "t", "erased": erased, "seen": False, "before": {"share": 1.0}, "after": after_all}
        found["each"] = {concept: {"after": after_all}}
        return found | {"lost": 1.0 - after, "lost_interval": [0.9 - after, 1.1 - after]}

    groups = {"paraphrases": rates(True, left), "neighbours": rates(False, 1 - lost)}
    return {"concept": concept, "seed": seed, "prompt_groups": groups, "nfe": 600, "seconds": None}


def test_rows_are_compared_on_what_all_of_them_have_run(module):
    runs = {
        "a": [made("fox", 0.1, 0.0), made("owl", 0.5, 0.5), made("fox", 0.9, 0.9, seed=1)],
        "b": [made("fox", 0.2, 0.3)],
    }
    shared = {name: module.summary(rows) for name, rows in module.in_common(runs).items()}
    assert shared["a"]["prompt_groups"]["paraphrases"]["mean"] == pytest.approx(0.1)
    lines = module.short_table(shared).splitlines()
    assert lines[2].startswith("| a | 1 | 10.0 (10) |") and lines[3].startswith("| b | 1 | 20.0 (20) |")
    text = module.markdown({name: module.summary(rows) for name, rows in runs.items()}, shared, ["command"])
    # and all that is known stands below: over concepts, whose seeds count as one; a run alone has the interval of its images
    assert "| a | 3 | 50.0 (50.0 to 50.0; 90) |" in text and "| b | 1 | 20.0 (10.0 to 30.0; 20) |" in text
    assert "| b | 1 | 30.0 (20.0 to 40.0; 30) |" in text
    alone = module.summary([made("fox", 0.1, 0.0), made("fox", 0.3, 0.0, seed=1)])["prompt_groups"]["paraphrases"]
    assert alone["interval"] is None and alone["mean"] == pytest.approx(0.2)  # seeds of one concept are alike


def test_each_command_that_made_a_part_is_kept(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "plot", lambda *_: None)  # matplotlib is the benchmarks' alone
    for argv in (["e.py", "--methods", "a"], ["e.py", "--methods", "b"], ["e.py", "--methods", "a"]):
        monkeypatch.setattr("sys.argv", argv)
        module.save(tmp_path / "found", {"a": {}}, [made("fox", 0.1, 0.0) | {"method": "a"}])
    told = ["python e.py --methods a", "python e.py --methods b"]
    assert json.loads((tmp_path / "found.json").read_text())["commands"] == told
    assert (tmp_path / "found.md").read_text().startswith(f"`{told[0]}`\n\n`{told[1]}`\n")


def test_a_run_of_several_concepts_has_an_interval_over_these(module):
    several = made("-", 0.2, 0.0)
    several["prompt_groups"]["paraphrases"]["each"] = {
        name: {"after": {"share": x}} for name, x in (("fox", 0.0), ("owl", 0.4))
    }
    low, high = module.summary([several])["prompt_groups"]["paraphrases"]["interval"]
    assert (low, high) == (0.0, 0.4)


def test_what_was_not_measured_has_no_table(module):
    alone = made("fox", 0.2, 0.0)
    del alone["prompt_groups"]["neighbours"]
    text = module.markdown({"a": module.summary([alone])}, {}, ["command"])
    assert "left of the concept" in text and "lost on other prompts" not in text


def test_rows_without_runs_in_common_are_not_compared(module):
    runs = {"a": [made("fox", 0.1, 0.0)], "b": [made("owl", 0.2, 0.3)]}
    shared = {name: module.summary(rows) for name, rows in module.in_common(runs).items()}
    assert not any(s["runs"] for s in shared.values())
    assert "in common" not in module.markdown(
        {name: module.summary(rows) for name, rows in runs.items()}, shared, ["command"]
    )


def test_the_readme_shows_what_was_measured():
    rows = re.findall(r"^\| .* \| [\d,]+ \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    measured = (ROOT / "benchmarks" / "results" / "procedures.md").read_text(encoding="utf-8").splitlines()
    assert rows and {*rows} <= {*measured}
