"""One config: the command line, YAML and Python agree, and every mistake is one sentence."""

import pytest

from esd_peft.adapters.options import MergeConfig
from esd_peft.cli import parse
from esd_peft.config import Concept, EraseConfig
from esd_peft.errors import UserError


def erase(*argv: str) -> EraseConfig:
    return parse(EraseConfig, "erase", list(argv))


def test_command_line_yaml_and_python_are_the_same(tmp_path):
    python = EraseConfig(concept=["circle", "striped"], rank=4, eta=2.0, scope="esd-u", gradient_checkpointing=True)
    line = erase("--concept", "circle", "--concept", "striped", "--rank", "4", "--eta", "2", "--scope", "esd-u",
                 "--gradient-checkpointing")  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(python.to_yaml())
    assert line == python
    assert erase("--config", str(file)) == python


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("concept: [circle]\npreserve: [a star]\nrank: 4\nseed: 3\n")
    config = erase("--config", str(file), "--rank", "16", "--concept", "square", "--preserve=a heart")
    assert (config.concept_names, config.rank, config.seed) == (["square"], 16, 3)
    assert config.preserve == ["a heart"]


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
        (["--concept", "circle", "--adapter", "lorra"], "--adapter"),
        (["--concept", "circle", "--eta", "-1"], "--eta"),
        (["--concept", "circle", "--eta", "nan"], "--eta"),
        (["--concept", "circle", "--hold", "1"], "--hold"),
        (["--concept", "circle", "--concept", "circle"], "--concept: circle is named twice"),
        (["--concept", "circle", "--erase-from", " "], "--erase-from"),
        (["--concept", "circle", "--map-to", ""], "--map-to"),
        (["--concept", "circle", "--preserve", ""], "--preserve"),
        (["--concept", "circle", "--null-space", "1"], "--null-space"),
        (["--concept", "circle", "--min-timestep", "500", "--max-timestep", "400"], "--min-timestep"),
        (["--concept", "circle", "--until", "2"], "--until"),
        (["--concept", "circle", "--until", "-1"], "--until must be above"),
        (["--concept", "circle", "--adapter", "loha", "--null-space", "0.9"], "--null-space works with"),
        (["--concept", "circle", "--preserve-trajectories", "3"], "--preserve-trajectories needs"),
        (["--concept", "circle", "--hold", "0.5", "--train-batch-size", "1"], "--hold needs"),
        (["--concept", "circle", "--lr-scheduler", "constant", "--lr-warmup-steps", "3"], "--lr-warmup-steps needs"),
        (["--concept", "circle", "--concept", "red", "--objective", "contrastive", "--reference", "x"], "--reference"),
        (["--concept", "circle", "--objective", "contrastive", "--eta", "1"], "--eta works with --objective esd only"),
        (["--concept", "circle", "--objective", "contrastive", "--hold", "0.5"], "--hold works with"),
        (["--concept", "circle", "--reference", "here"], "--reference works with --objective contrastive only"),
        (["--concept", "circle", "--learning-rate", "0"], "--learning-rate"),
        (["--concept", "circle", "--optimizer", "SGD"], "--optimizer"),
        (["--concept", "circle", "--dtype", "float8"], "--dtype"),
        (["--concept", "circle", "--seed", "-1"], "--seed"),
        (["--concept", "circle", "--quantize", "nf4", "--adapter", "lokr"], "--quantize"),
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
        ("concept: [{name: circle, etta: 2}]\n", "--concept etta is not an option"),
        ("concept: [{eta: 2}]\n", "--concept name is missing"),
        ("concept: [{name: circle, weight: -1}]\n", "--concept weight"),
        ("concept: [{name: circle, weight: 2}]\nobjective: contrastive\n", "--weight works with --objective esd only"),
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
    file.write_text("concept:\n- striped\n- {name: circle, eta: 2, map_to: square, weight: 0.5}\n")
    config = erase("--config", str(file))
    assert config.concept == [Concept(name="striped"), Concept(name="circle", eta=2.0, map_to="square", weight=0.5)]
    file.write_text(config.to_yaml())
    assert erase("--config", str(file)) == config
    assert erase("--config", str(file), "--concept", "heart").concept == [Concept(name="heart")]
