"""Every option, given something that cannot work: one sentence that names it, exit code 2, nothing written."""

import importlib
import json
import re
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import commands
from esd_peft.errors import UserError
from esd_peft.options.base import groups_of
from esd_peft.options.command_line import read_yaml, run_command
from esd_peft.options.erase import EraseConfig
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.options.merge import MergeConfig
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig
from mistakes import TABLES, USUAL

LORA = {f"base_model.model.time_embedding.linear_1.{name}.weight": torch.zeros(size) for name, size in
        (("lora_A", (1, 64)), ("lora_B", (256, 1)))}  # fmt: skip
COMMANDS = {
    "erase": EraseConfig,
    "merge_adapter": MergeConfig,
    "evaluate": EvaluateConfig,
    "study make": MakeStudyConfig,
    "study analyse": AnalyseStudyConfig,
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Files and folders that the mistakes name; the working directory is empty."""
    here = tmp_path / "here"
    for folder in (here, tmp_path / "full", tmp_path / "adapter", tmp_path / "images"):
        folder.mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "text").write_text("# a comment\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": ["linear_1"], "r": 1}'
    )
    save_file(LORA, tmp_path / "adapter" / "adapter_model.safetensors")
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "one.png")
    (tmp_path / "prompts").write_text("prompt\na circle\na star\n")
    key = {"study": "s", "question": "Round?", "conditions": ["a"], "items": {"1": {"condition": "a", "file": "one.png"}}}
    (tmp_path / "key").write_text(json.dumps(key))
    (tmp_path / "answers").write_text("study,rater,item,rating\ns,R,1,3\n")
    monkeypatch.chdir(here)
    return {path.name: str(path) for path in tmp_path.iterdir()}


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(command, words, tmp_path, monkeypatch, capsys):
    """Run the command; its one sentence."""
    before = contents(tmp_path)
    module, *job = command.split()
    monkeypatch.setattr(sys, "argv", [module, *job, *words])
    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module(f"esd_peft.{module}" + (".__main__" if job else "")).main)
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n"), said
    assert "Traceback" not in said.err and not said.out
    assert contents(tmp_path) == before, "something was written"
    return errors[0]


ROWS = [(command, line, says) for command, table in TABLES.items() for line, says in table]


@pytest.mark.parametrize(("command", "line", "says"), ROWS, ids=lambda x: x[:60])
def test_command_lines(command, line, says, places, tmp_path, monkeypatch, capsys):
    named = {word.partition("=")[0] for word in line.split()}
    usual = [
        word for option, value in USUAL.get(command, {}).items() if line and option not in named for word in (option, value)
    ]
    words = [word.format(**places) for word in [*usual, *line.split()]]
    sentence = refused(command, words, tmp_path, monkeypatch, capsys)
    assert re.search(says, sentence), sentence


def homes(config):
    """All options of a command, and the group that each is in: none for the command's own."""
    groups = groups_of(config)
    own = {name: None for name in config.model_fields if name not in groups}
    return own | {name: group for group, kind in groups.items() for name in kind.model_fields}


def wrong(field):
    """Values that a field of a JSON schema does not take, by its bounds, its choices or its type."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    if len(kinds) > 1 or not {"enum", "minimum", "exclusiveMinimum", "type"} & {*kinds[0]}:
        return []
    (kind,) = kinds
    found = [str(kind["minimum"] - 1)] if "minimum" in kind else []
    found += [str(kind["exclusiveMinimum"])] if "exclusiveMinimum" in kind else []
    found += [str(kind["maximum"] + 1)] if "maximum" in kind else []
    found += [str(kind["exclusiveMaximum"])] if "exclusiveMaximum" in kind else []
    of_types = {"integer": ["few", "2.5", "nan"], "number": ["few", "nan", "inf"], "boolean": ["perhaps"]}
    return found + ["neither"] * ("enum" in kind) + of_types.get(kind.get("type"), [])


def out_of_bounds(config):
    """The options that say which values they take, each with some that it does not."""
    fields = {}
    for kind in (config, *groups_of(config).values()):
        fields |= kind.model_json_schema()["properties"]
    return {name: values for name in homes(config) if (values := wrong(fields[name]))}


REQUIRED = {
    "erase": {"concept": "circle"},
    "merge_adapter": {"adapter": "nowhere", "output": "out"},
    "evaluate": {"erased": "nowhere"},
    "study make": {"condition": ["nowhere"], "question": "Round?"},
    "study analyse": {"answers": ["nowhere"], "key": "nowhere"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_an_option_does_not_take(command):
    """Here by their sentences alone; the tables have one of each kind as a command line."""
    for name, values in out_of_bounds(COMMANDS[command]).items():
        for value in values:
            with pytest.raises(UserError, match=f"^--{name.replace('_', '-')}: .*{re.escape(value)}") as error:
                COMMANDS[command](**REQUIRED[command] | {name: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_left_out(command):
    tried = {word.partition("=")[0] for line, _ in TABLES[command] for word in line.split()}
    tried |= {"--" + name.replace("_", "-") for name in out_of_bounds(COMMANDS[command])}
    options = {"--" + name.replace("_", "-") for name in homes(COMMANDS[command])}
    assert options <= tried, options - tried


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_of_the_yaml(command, tmp_path):
    """Given a map, and a list in a list; alone and, where it is in one, in its group."""
    path, config = tmp_path / "job.yaml", COMMANDS[command]
    for name, home in homes(config).items():
        for value in ({"a": ["map"]}, [[1, None]]):
            for values in ({name: value}, {home: {name: value}} if home else {name: value}):
                path.write_text(yaml.safe_dump(values))
                with pytest.raises(UserError, match=f"job.yaml: --{name.replace('_', '-')}") as error:
                    read_yaml(path, config)
                assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a YAML map of options"),
        ("- concept: circle", "must be a YAML map of options"),
        ("concept: circle\nlearning_rat: 0.1", "unknown option learning_rat; did you mean learning_rate"),
        ("concept: circle\n1: 2", "unknown option 1; --print-config lists the options"),
        ("concept: [circle", "is not YAML"),
        ("concept: !!python/object/apply:os.system [echo]", "is not YAML"),
        ("concept: [{name: circle, colour: red}]", "--concept colour is not an option"),
        ("concept: [{erase_from: circle}]", "--concept name is missing"),
        ("concept: [{name: circle, negative_guidance: 101}]", "--concept negative_guidance.*less than or equal to 100"),
        ("concept: [{name: circle, weight: 0}]", "--concept weight.*greater than 0"),
        ("concept: [{name: circle, map_to: ''}]", "--concept map_to"),
        ("concept: circle\nseed: .nan", "--seed"),
        ("concept: circle\nrank: 99999999999999999999", "--rank"),
        ("concept: circle\ntraining: {learning_rat: 0.1}", "unknown option learning_rat; did you mean learning_rate"),
        ("concept: circle\nstudent: {1: 2}", "unknown option 1; --print-config lists the options"),
        ("concept: circle\nstudent: null", "student is a group of options; write them below it"),
        ("concept: circle\nstudent: lora", "student is a group of options; write them below it"),
    ],
)
def test_yaml(text, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "job.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    sentence = refused("erase", ["--config", "job.yaml"], tmp_path, monkeypatch, capsys)
    assert re.search(f"job.yaml.*{says}", sentence), sentence


@pytest.mark.parametrize(
    "line", ["erase --concept circle --per-device-batch-size 0", "merge_adapter --adapter x --output y"]
)
def test_as_processes(line, tmp_path):
    done = commands.run(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]
