"""One config: the command line, YAML and Python agree, and every mistake is one sentence."""

import pytest

from esd_peft.errors import UserError
from esd_peft.options.base import groups_of, readers
from esd_peft.options.command_line import parse
from esd_peft.options.erase import EraseConfig
from esd_peft.options.merge import MergeConfig
from esd_peft.options.prompts import Concept


def erase(*argv: str) -> EraseConfig:
    return parse(EraseConfig, "erase", list(argv))


def test_command_line_yaml_and_python_are_the_same(tmp_path):
    python = EraseConfig(
        concept=["circle", "striped"], rank=4, negative_guidance=2.0, scope="esd-u", gradient_checkpointing=True
    )
    line = erase("--concept", "circle", "--concept", "striped", "--rank", "4", "--negative-guidance", "2",
                 "--scope", "esd-u", "--gradient-checkpointing")  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(python.to_yaml())
    assert line == python
    assert erase("--config", str(file)) == python


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("concept: [circle]\npreserve: [a star]\nrank: 4\nseed: 3\n")
    config = erase("--config", str(file), "--rank", "16", "--concept", "square", "--preserve=a heart")
    assert (config.prompts.concept_names, config.student.rank, config.training.seed) == (["square"], 16, 3)
    assert config.prompts.preserve == ["a heart"]


@pytest.mark.parametrize(
    "text",
    [
        "concept: [circle]\nrank: 4\nseed: 3\nmodel: sd\n",
        "prompts: {concept: [circle]}\nstudent: {rank: 4}\ntraining: {seed: 3}\npretrained: {model: sd}\n",
        "concept: circle\nstudent:\n  rank: 4\nseed: 3\npretrained:\n  model: sd\n",
        "student: {adapter_type: lora}\nrank: 4\nprompts: {concept: circle}\nmodel: sd\nseed: 3\n",
    ],
    ids=["flat", "in groups", "some of each", "one group of each"],
)
def test_yaml_may_be_flat_or_in_groups(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    expected = EraseConfig(concept="circle", rank=4, seed=3, model="sd")
    assert erase("--config", str(file)) == expected
    assert erase("--config", str(file), "--rank", "8", "--concept", "star") == EraseConfig(
        concept="star", rank=8, seed=3, model="sd"
    )
    assert EraseConfig(prompts={"concept": "circle"}, student={"rank": 4}, seed=3, pretrained={"model": "sd"}) == expected


@pytest.mark.parametrize("twice", [4, 8])
def test_an_option_given_alone_and_in_its_group_is_refused(tmp_path, twice):
    says = "--max-train-steps is given twice, alone and in the group training; give it once"
    file = tmp_path / "config.yaml"
    file.write_text(f"concept: circle\nmax_train_steps: 4\ntraining: {{max_train_steps: {twice}}}\n")
    with pytest.raises(UserError, match=says):
        erase("--config", str(file))
    with pytest.raises(UserError, match=says):
        EraseConfig(concept="circle", max_train_steps=4, training={"max_train_steps": twice})
    with pytest.raises(UserError, match=says):
        EraseConfig(concept="circle").replace(max_train_steps=4, training={"max_train_steps": twice})


def test_flat_has_every_option_by_its_name():
    config = EraseConfig(concept=["circle", {"name": "red", "weight": 2}], rank=4, output="somewhere")
    flat = config.flat()
    fields = {name: field for group in groups_of(EraseConfig).values() for name, field in group.model_fields.items()}
    assert set(flat) == {name for name, field in fields.items() if not readers(field)}
    assert flat["concept"] == ["circle", {"name": "red", "weight": 2.0}]
    assert (flat["rank"], flat["output"], flat["learning_rate"], flat["seed"]) == (4, "somewhere", None, 0)
    with_eta = EraseConfig(concept="circle", negative_guidance=2.0).flat()
    assert with_eta.keys() - flat.keys() == {"negative_guidance"}, "what some methods do not read is there if it is given"
    assert EraseConfig(**flat) == config


def test_a_name_belongs_to_one_group_only():
    names = [name for group in groups_of(EraseConfig).values() for name in group.model_fields]
    assert sorted(names) == sorted(set(names)) and not set(names) & EraseConfig.model_fields.keys()


def test_replace_changes_options_wherever_they_are():
    config = EraseConfig(concept="circle")
    changed = config.replace(rank=4, seed=7, concept=[Concept(name="star")])
    assert changed == EraseConfig(concept="star", rank=4, seed=7) and config == EraseConfig(concept="circle")
    assert config.student.replace(rank=4) == changed.student


def test_help_shows_what_most_people_need(capsys):
    with pytest.raises(SystemExit) as stop:
        erase("--help", "--concept", "circle")
    shown = capsys.readouterr().out
    assert not stop.value.code and "--help-all shows all options" in shown
    flags = [line.split()[0] for line in shown.splitlines() if line.startswith("  --")]
    assert flags == ["--" + name.replace("_", "-") for name in EraseConfig.usual] and len(flags) < 10
    assert "The training method (layers, denoiser, trajectories or contrastive)" in " ".join(shown.split())


def test_help_all_shows_the_groups(capsys):
    with pytest.raises(SystemExit) as stop:
        erase("--help-all")
    assert not stop.value.code
    shown: dict[str, list[str]] = {"": []}  # by heading
    for line in capsys.readouterr().out.splitlines():
        text = line.strip("│╭╮╰╯─ ")  # of tyro's boxes, where the encoding has them
        if text.endswith(" options"):
            shown[text.removesuffix(" options")] = []
        else:
            next(reversed(shown.values())).append(line[2:].rstrip("│ "))
    for name, group in groups_of(EraseConfig).items():
        assert " ".join(group.__doc__.split()) in " ".join(shown[name])
        flags = {line.split()[0].rstrip(",") for line in shown[name] if line.startswith("--") and line.strip("-")}
        assert flags == {"--" + option.replace("_", "-") for option in group.model_fields}


def test_print_config_prints_what_config_reads(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        erase("--concept", "circle", "--seed", "7", "--print-config")
    assert not stop.value.code
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out)
    assert erase("--config", str(file)) == EraseConfig(concept=["circle"], seed=7)


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], "--concept"),
        (["--concept", ""], "--concept"),
        (["--concept", "  "], "--concept"),
        (["--concept", "circle", "--rank", "0"], "--rank"),
        (["--concept", "circle", "--rank", "two"], "--rank"),
        (["--concept", "circle", "--scope", "esd-y"], "--scope"),
        (["--concept", "circle", "--adapter-type", "lorra"], "--adapter-type"),
        (["--concept", "circle", "--negative-guidance", "-1"], "--negative-guidance"),
        (["--concept", "circle", "--negative-guidance", "nan"], "--negative-guidance"),
        (["--concept", "circle", "--preservation-ratio", "1"], "--preservation-ratio"),
        (["--concept", "circle", "--concept", "circle"], "--concept: circle is named twice"),
        (["--concept", "circle", "--erase-from", " "], "--erase-from"),
        (["--concept", "circle", "--map-to", ""], "--map-to"),
        (["--concept", "circle", "--preserve", ""], "--preserve"),
        (["--concept", "circle", "--adapter-type", "loha", "--closed-form", "True"], "--closed-form needs"),
        (["--concept", "circle", "--preservation-ratio", "0.5", "--train-batch-size", "1"], "--preservation-ratio needs"),
        (["--concept", "circle", "--method", "distil"], "--method"),
        (["--concept", "circle", "--learning-rate", "0"], "--learning-rate"),
        (["--concept", "circle", "--optimizer", "SGD"], "--optimizer"),
        (["--concept", "circle", "--dtype", "float8"], "--dtype"),
        (["--concept", "circle", "--seed", "-1"], "--seed"),
        (["--concept", "circle", "--quantize", "nf4", "--adapter-type", "lokr"], "--quantize"),
        (["--concept", "circle", "--trajectorys", "3"], "--trajectorys"),
        (["--config", "no/such/file.yaml"], "--config"),
        (["--config"], "--config"),
    ],
    ids=" ".join,
)
def test_bad_options_name_the_option_in_one_sentence(argv, names):
    with pytest.raises(UserError, match=names) as error:
        erase(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("concept: circle\nrnak: 3\n", "did you mean rank"),
        ("concept: circle\nrank: [3]\n", "--rank"),
        ("- circle\n", "map"),
        ("concept: [circle\n", "not YAML"),
        ("concept: 3\n", "--concept"),
        ("concept: [{name: circle, eta: 2}]\n", "--concept eta is not an option"),
        ("concept: [{negative_guidance: 2}]\n", "--concept name is missing"),
        ("concept: [{name: circle, weight: -1}]\n", "--concept weight"),
        ("concept: circle\nstudent: {rnak: 3}\n", "did you mean rank"),
        ("concept: circle\nstudent: {seed: 3}\n", "unknown option seed"),
        ("concept: circle\nstudnet: {rank: 3}\n", "unknown option studnet; did you mean student"),
        ("concept: circle\nstudent: {rank: [3]}\n", "--rank"),
        ("concept: circle\nstudent: 3\n", "student is a group of options; write them below it"),
        ("concept: circle\nstudent: [rank]\n", "student is a group of options; write them below it"),
        ("concept: circle\nstudent: 3\nrank: 3\n", "student is a group of options, --rank among them"),
        ("prompts: {erase_from: shirt}\n", "--concept: name what to erase"),
    ],
)
def test_bad_yaml(tmp_path, text, says):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        erase("--config", str(file))
    assert "\n" not in str(error.value)


def test_merge_needs_an_adapter_and_an_output():
    with pytest.raises(UserError, match="--adapter"):
        parse(MergeConfig, "merge_adapter", ["--output", "x"])
    with pytest.raises(UserError, match="--output"):
        parse(MergeConfig, "merge_adapter", ["--adapter", "x"])


def test_concepts_in_yaml_have_their_own_eta_and_anchor(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("concept:\n- striped\n- {name: circle, negative_guidance: 2, map_to: square, weight: 0.5}\n")
    config = erase("--config", str(file))
    assert config.prompts.concept == [
        Concept(name="striped"),
        Concept(name="circle", negative_guidance=2.0, map_to="square", weight=0.5),
    ]
    file.write_text(config.to_yaml())
    assert erase("--config", str(file)) == config
    assert erase("--config", str(file), "--concept", "heart").prompts.concept == [Concept(name="heart")]
