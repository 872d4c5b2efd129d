"""Each recipe is a config that erases, and the peers' are those that benchmarks compare with."""

import importlib
from pathlib import Path

import pytest

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options.command_line import parse

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_a_config_that_a_command_line_can_add_to(path):
    config = parse(EraseConfig, "erase", ["--config", str(path), "--concept", "circle", "--seed", "3"])
    assert (config.prompts.concept_names, config.training.seed) == (["circle"], 3)
    resolved, _ = resolve(config, open_family("shapes"))
    assert resolved.student.scope == config.student.scope or config.student.scope is None
    assert path.read_text().startswith("# "), "a recipe says what it is"


def test_benchmarks_compare_with_the_recipes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    methods = importlib.import_module("methods")
    for method, name in (("paper", "paper"), ("authors' scripts", "authors"), ("LECO", "leco")):
        rows = [options for row, options in methods.PROCEDURES.items() if row.startswith(f"{method}, ")]
        assert len(rows) == 2, "at two rates"
        for options, recipe in ((options, methods.recipe(name)) for options in rows):
            differs = {option for option in options | recipe if options.get(option) != recipe.get(option)}
            assert differs <= {"learning_rate", "max_train_steps"}
    attacks = importlib.import_module("attacks")
    assert attacks.METHODS["--method denoiser"] == methods.recipe("robust")


def test_what_the_peers_take_a_step():
    """The counts that docs give: 49 steps of a trajectory on average less than half of them kept, teacher and student."""
    for name, rollout in (("paper", "student"), ("authors", "teacher"), ("leco", "student")):
        config = parse(
            EraseConfig, "python -m esd_peft.erase", ["--config", str(ROOT / f"recipes/{name}.yaml"), "--concept", "circle"]
        )
        assert (config.buffer.rollout, config.buffer.buffer_refresh_interval) == (rollout, 1)
        assert (config.training.train_batch_size, config.training.preservation_ratio) == (1, 0)
        assert config.student.closed_form is False
