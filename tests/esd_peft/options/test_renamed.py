"""Options of the release before this one: taken under their new names, with a note, or refused with what to use instead."""

import pytest

from esd_peft import EraseConfig, MergeConfig, UserError
from esd_peft.options.base import flag
from esd_peft.options.command_line import parse
from esd_peft.options.renamed import _GONE, OLD, rename_arguments

RENAMED = [  # what was given, what it is now
    ({"attention_steps": 700}, {"method": "layers", "max_train_steps": 700}),
    ({"attention_steps": 700, "max_train_steps": 0}, {"method": "layers", "max_train_steps": 700}),
    ({"attention_steps": 0}, {"method": "trajectories"}),
    ({"attention_steps": 0, "max_train_steps": 40}, {"method": "trajectories", "max_train_steps": 40}),
    ({"augment_prompts": True}, {"method": "denoiser"}),
    ({"augment_prompts": True, "attention_steps": 0}, {"method": "denoiser"}),
    ({"augment_prompts": False}, {}),
    ({"objective": "contrastive"}, {"method": "contrastive"}),
    ({"objective": "contrastive", "attention_steps": 0}, {"method": "contrastive"}),
    ({"objective": "esd"}, {}),
    ({"robust": 0}, {}),
    ({"guided_rollout_ratio": 0.0}, {"rollout": "teacher"}),
    ({"guided_rollout_ratio": 0}, {"rollout": "teacher"}),
    ({"null_space": 0.0}, {"closed_form": False}),
    ({"hub_model_id": "me/it"}, {"push_to_hub": "me/it"}),
]


@pytest.mark.parametrize(("old", "new"), RENAMED, ids=str)
def test_old_names_are_the_new_ones_with_a_note(old, new, capsys):
    assert EraseConfig(concept="circle", **old) == EraseConfig(concept="circle", **new)
    said = capsys.readouterr().err
    gone = [name for name in old if name != "max_train_steps"]
    assert said.count("note: --") == len(gone) and all(f"--{name.replace('_', '-')} is now" in said for name in gone)
    words = [word for name, value in old.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for line in (words, [f"{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]):
        parsed = parse(
            EraseConfig, "python -m esd_peft.erase", rename_arguments(["--concept", "circle", *line, "--seed", "3"])
        )
        assert parsed == EraseConfig(concept="circle", seed=3, **new)


@pytest.mark.parametrize(
    ("old", "says"),
    [
        *(({name: 3}, f"{flag(name)} is gone; ") for name in _GONE),
        ({"guided_rollout_ratio": 0.3}, "--guided-rollout-ratio is gone; use --rollout mixed"),
        ({"null_space": 0.9}, "--null-space is gone; use --closed-form True"),
        ({"null_space": 0, "closed_form": True}, "--null-space is now --closed-form False, and --closed-form True"),
        ({"robust": 3}, "--robust is gone: --method denoiser withstands"),
        ({"attention_steps": "few"}, "--attention-steps is now --method layers --max-train-steps, a whole number"),
        ({"attention_steps": -1}, "--attention-steps is now --method layers --max-train-steps, a whole number"),
        ({"attention_steps": 800, "max_train_steps": 40}, "two stages are gone; leave one of them out"),
    ],
    ids=str,
)
def test_what_is_gone_is_refused(old, says):
    with pytest.raises(UserError, match=says):
        EraseConfig(concept="circle", **old)
    with pytest.raises(UserError, match=says):
        rename_arguments([f"--{name.replace('_', '-')}={value}" for name, value in old.items()])


def test_the_repository_is_now_the_value_of_push_to_hub(capsys):
    assert EraseConfig(concept="circle", push_to_hub=True, hub_model_id="me/it").hub.push_to_hub == "me/it"
    words = ["--concept", "circle", "--push-to-hub", "--hub-model-id", "me/it", "--seed", "3"]
    assert rename_arguments(words) == ["--concept", "circle", "--seed", "3", "--push-to-hub=me/it"]
    assert capsys.readouterr().err.count("note: --hub-model-id is now --push-to-hub me/it") == 2
    merged = MergeConfig(adapter="erased", output="merged", hub_model_id="me/it")
    assert merged.push_to_hub == "me/it"
    with pytest.raises(UserError, match="--push-to-hub now takes the repository, as OWNER/NAME; name it"):
        EraseConfig(concept="circle", push_to_hub=True)


@pytest.mark.parametrize("name", OLD)
def test_a_yaml_file_is_told_what_to_write_instead(name, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(f"concept: circle\n{name}: 0\n")
    with pytest.raises(UserError, match=f"unknown option {name}; it was of an earlier version: it is (gone|now)"):
        parse(EraseConfig, "python -m esd_peft.erase", ["--config", str(file)])


def test_a_command_line_of_today_is_left_as_it_is(capsys):
    words = ["--concept", "circle", "--method", "layers", "--max-train-steps", "5"]
    assert rename_arguments(words) == words and not capsys.readouterr().err
