"""Presets: each is a config that erases what it says, and that a file and a command line can change."""

import pytest

from esd_peft import EraseConfig, UserError
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options.command_line import parse
from esd_peft.presets import PRESETS
from esd_peft.prompts.plan import mentions


def erase(*argv):
    return parse(EraseConfig, "erase", [*argv], presets=PRESETS)


def test_there_is_one_for_each_kind():
    assert {*PRESETS} == {"nudity", "violence", "style", "celebrity", "object", "watermark"}


@pytest.mark.parametrize("name", PRESETS)
def test_it_comes_to_a_plan_that_keeps_what_it_says(name):
    text = PRESETS[name].read_text(encoding="utf-8")
    assert text.startswith("# "), "a preset says what it is, and where its words come from"
    config = erase("--preset", name, *([] if "concept:" in text else ["--concept", "fox"]))
    _, plan = resolve(config, open_family("emoji"))
    assert plan.user_preserved == config.prompts.preserve and len(plan.user_preserved) >= 7
    assert not any(mentions(said, prompt) for said in config.prompts.erased_names for prompt in plan.user_preserved)
    assert len(plan.synonyms[0]) == len(config.prompts.concept[0].also_erase)


def test_a_file_wins_over_it_and_the_command_line_over_both(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("prompts: {map_to: somebody}\ntraining: {seed: 3}\n")
    config = erase("--preset", "celebrity", "--config", str(file), "--concept", "Brad Pitt")
    assert (config.prompts.map_to, config.training.seed) == ("somebody", 3)
    assert "a politician giving a speech" in config.prompts.preserve
    config = erase(
        "--preset=celebrity", "--config", str(file), "--concept", "Brad Pitt", "--map-to", "a man", "--preserve", "x"
    )
    assert (config.prompts.map_to, config.prompts.preserve) == ("a man", ["x"])
    assert erase("--preset", "nudity", "--concept", "gore").prompts.concept_names == ["gore"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--preset", "nudty"], "--preset nudty is not known; did you mean nudity?"),
        (["--preset", "xyz"], "--preset xyz is not known; there are celebrity, nudity"),
        (["--preset"], "--preset needs a name: celebrity, nudity"),
        (["--preset", "style"], "--concept: name what to erase"),
    ],
    ids=["misspelled", "unknown", "missing", "without its concept"],
)
def test_what_cannot_be_one_is_said(given, says):
    with pytest.raises(UserError) as error:
        erase(*given)
    assert str(error.value).startswith(says)
