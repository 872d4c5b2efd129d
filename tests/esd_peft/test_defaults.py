"""What stands for an option that was left out: one value, known before the run, which the files it writes hold."""

import contextlib
import json
import math

import pytest
import torch
import yaml
from PIL import Image

from esd_peft import EraseConfig, UserError
from esd_peft.checks import check_model
from esd_peft.cli import parse
from esd_peft.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options import Auto, Options, groups_of
from families import draw_small, save_family


def left_out(config: EraseConfig) -> list[str]:
    """The options that have no value: after `resolve` only those that the run does not read."""
    found = []
    for group, kind in groups_of(type(config)).items():
        options: Options = getattr(config, group)
        found += [n for n, field in kind.model_fields.items() if Auto in field.metadata and getattr(options, n) is None]
    return found


TRAJECTORIES = {
    "negative_guidance", "trajectories", "preservation_trajectories", "num_inference_steps", "guidance_scale",
    "buffer_refresh_interval", "preservation_ratio",
}  # fmt: skip
CONFIGS = {  # and what stays left out: options that the run does not read
    "the defaults": ({}, set()),
    "several concepts": ({"concept": ["circle", "red", "striped"]}, set()),
    "a concept of its own": ({"concept": ["star", {"name": "circle", "map_to": "square", "weight": 2}]}, set()),
    "map_to": ({"map_to": "square"}, set()),
    "negative_guidance and map_to": ({"map_to": "square", "negative_guidance": 0.5}, set()),
    "erase_from": ({"concept": "striped", "erase_from": "circle"}, set()),
    "robust": ({"robust": 2}, set()),
    "robust, several concepts": ({"robust": 1, "concept": ["circle", "red"]}, set()),
    "no adapter": ({"adapter_type": "none"}, {"rank", "alpha"}),
    "loha": ({"adapter_type": "loha"}, set()),
    "lokr of all layers": ({"adapter_type": "lokr", "scope": "full", "alpha": 3.0}, set()),
    "esd-u": ({"scope": "esd-u"}, set()),
    "no null space": ({"null_space": 0.0}, set()),
    "student rollouts": ({"rollout": "student"}, set()),
    "a buffer of one step": ({"buffer_refresh_interval": 1}, set()),
    "contrastive": ({"objective": "contrastive"}, TRAJECTORIES),
    "contrastive, several concepts": ({"objective": "contrastive", "concept": ["circle", "red"]}, TRAJECTORIES),
    "one sample a step": ({"train_batch_size": 1}, set()),
    "preserve": ({"preserve": ["a star", "a red square"]}, set()),
    "stop_at": ({"stop_at": -0.5}, set()),
    "offload": ({"offload": True, "gradient_checkpointing": True}, set()),
    "validation_prompt": ({"validation_prompt": ["a circle"]}, set()),
    "half precision": ({"dtype": "bfloat16", "quantize": "nf4"}, set()),
}


@pytest.fixture(scope="module")
def shapes():
    return open_family("shapes")


def config(**options):
    return EraseConfig(**({"concept": "circle", "device": "cpu"} | options))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resolved_config_has_all_values_and_is_read_again_as_it_is(name, shapes, tmp_path):
    options, unread = CONFIGS[name]
    given = config(**options)
    resolved, prompts = resolve(given, shapes)
    assert {*left_out(resolved)} == unread | (set() if "validation_prompt" in options else {"validation_steps"})
    assert resolve(resolved, shapes) == (resolved, prompts)
    again = EraseConfig(**yaml.safe_load(resolved.to_yaml()))
    assert again == resolved and again.to_yaml() == resolved.to_yaml(), "8.0 is not written as 8"
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    assert parse(EraseConfig, "erase", ["--config", str(file)]) == resolved
    assert EraseConfig(**resolved.flat()) == resolved
    kept = {name: value for name, value in given.flat().items() if name in options and name not in ("concept", "scope")}
    assert resolved.flat() | kept == resolved.flat(), "what was given stays"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_prompts_are_those_of_the_resolved_config(name, shapes):
    resolved, prompts = resolve(config(**CONFIGS[name][0]), shapes)
    etas = [{pair.eta for pair in pairs} for pairs in prompts.concept_pairs]
    assert etas == [{resolved.prompts.eta_of(concept)} for concept in resolved.prompts.concept]


def test_left_out_names_every_option_that_a_default_stands_for():
    optional = {
        name
        for group in groups_of(EraseConfig).values()
        for name, field in group.model_fields.items()
        if "left out: " in " ".join(field.description.split()) and field.default is None
    }
    # of these some stay left out: the value says what is not done, or not named
    stays = {
        "map_to",
        "revision",
        "resolution",
        "max_sequence_length",
        "variant",
        "checkpoint_config",
        "reference",
        "snr_gamma",
        "stop_at",
        "hub_model_id",
    }
    assert {*left_out(EraseConfig(concept="circle"))} == optional - stays


def test_the_prompts_of_a_file_are_in_the_config(shapes, tmp_path):
    file = tmp_path / "keep.txt"
    file.write_text("# mine\na red square\n\na star\n", encoding="utf-8")
    resolved, prompts = resolve(config(preserve=["a star", "a heart"], preserve_file=file), shapes)
    file.unlink()
    assert resolved.prompts.preserve == ["a star", "a heart", "a red square"] and resolved.prompts.preserve_file is None
    assert [pair.prompt for pair in prompts.preserve] == prompts.given == resolved.prompts.preserve
    assert resolved.buffer.preservation_trajectories == 3
    assert resolve(EraseConfig(**yaml.safe_load(resolved.to_yaml())), shapes) == (resolved, prompts)


def test_where_the_tokenizer_knows_many_words_cross_attention_learns_by_itself(shapes):
    emoji = open_family("emoji")
    resolved, prompts = resolve(config(concept=["fox", "owl"]), emoji)
    student, training = resolved.student, resolved.training
    assert (student.attention_steps, student.scope, student.rank) == (1000, "esd-x-ff", 32)
    assert (student.closed_form, student.null_space) == (False, 0.0)
    assert (training.max_train_steps, resolved.prompts.negative_guidance) == (0, 1.0)
    assert resolve(resolved, emoji) == (resolved, prompts)
    mapped, _ = resolve(config(concept="fox", map_to="owl"), emoji)
    assert (mapped.student.attention_steps, mapped.prompts.negative_guidance) == (800, 0.5)
    assert resolve(config(), shapes)[0].student.attention_steps == 0, "it has nothing to hold the rest with"


@pytest.mark.parametrize(
    "options",
    [{"attention_steps": 0}, {"closed_form": True}, {"null_space": 0.9}, {"scope": "esd-x-strict"}, {"robust": 1},
     {"objective": "contrastive"}, {"adapter_type": "lokr"}, {"stop_at": 0.0}],
    ids=str,
)  # fmt: skip
def test_whoever_asks_for_something_else_gets_it(options):
    resolved, _ = resolve(config(concept="fox", **options), open_family("emoji"))
    assert resolved.student.attention_steps == 0 and resolved.training.max_train_steps > 0


OF_BATCHES = [
    {"learning_rate": 1e-4}, {"optimizer": "AdamW8bit"}, {"lr_scheduler": "linear"}, {"train_batch_size": 4}, {"robust": 1},
    {"stop_at": 0.0}, {"max_grad_norm": 0.5}, {"trajectories": 30}, {"rollout": "student"}, {"max_timestep": 500},
]  # fmt: skip


@pytest.mark.parametrize("options", OF_BATCHES, ids=str)
def test_what_layer_by_layer_would_not_read_is_refused(options):
    emoji, ((name, value),) = open_family("emoji"), options.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is for training steps, and this run has none"):
        resolve(config(concept="fox", attention_steps=800, **options), emoji)
    resolved, _ = resolve(config(concept="fox", attention_steps=0, **options), emoji)
    assert value in (getattr(resolved.training, name, None), getattr(resolved.buffer, name, None))
    some = {"attention_steps": 800, "max_train_steps": 40}
    assert resolve(config(concept="fox", **some, **options), emoji)[0].training.max_train_steps == 40


@pytest.mark.parametrize("line", ["a\tstar", "a star\x1b[2J", "x" * 4001])
def test_a_file_of_prompts_holds_what_options_may_hold(shapes, tmp_path, line):
    """Otherwise the config that is written beside the adapter could not be read again."""
    file = tmp_path / "keep.txt"
    file.write_text(f"a heart\n{line}\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"--preserve-file .*keep.txt: (.* is no character of a|longer than any) name or prompt"
    ):
        resolve(config(preserve_file=file), shapes)


def test_the_device_and_the_dtype_are_those_it_runs_on(shapes):
    resolved, _ = resolve(EraseConfig(concept="circle"), shapes)
    gpu = torch.cuda.is_available()
    assert (resolved.runtime.device, resolved.runtime.dtype) == (("cuda:0", "bfloat16") if gpu else ("cpu", "float32"))
    resolved, _ = resolve(config(offload=True, gradient_checkpointing=True), shapes)
    assert resolved.runtime.compile == "off"


MAPPED = {"concept": [{"name": "circle", "map_to": "square"}, "red"]}
RANK = "8 for each concept (16 with --attention-steps, --augment-prompts or --robust), at most 64"
SHARE = "0.125, 0.25 with --erase-from, 1/3 with --augment-prompts, or 0.5 with --robust"
SAMPLES = "8, 12 with --augment-prompts, or 32 with --objective contrastive"
ROWS = [  # an option, what its help says, with which options, and the value
    ("negative_guidance", "left out: 1, or for what is mapped to something 0", {}, 1.0),
    ("negative_guidance", "left out: 1, or for what is mapped to something 0", {"map_to": "square"}, 0.0),
    ("scope", "esd-u with --unprompted-guidance, otherwise esd-x-strict", {}, "esd-x-strict"),
    ("scope", "esd-u with --unprompted-guidance", {"unprompted_guidance": 1}, "esd-u"),
    ("scope", "full with --robust", {"robust": 1}, "full"),
    ("rank", RANK, {}, 8),
    ("rank", RANK, {"attention_steps": 5}, 16),
    ("null_space", "left out: 0 with --attention-steps", {"attention_steps": 5}, 0.0),
    ("scope", "esd-x-ff with --attention-steps", {"attention_steps": 5}, "esd-x-ff"),
    ("max_train_steps", "0 with --attention-steps", {"attention_steps": 5}, 0),
    ("rank", RANK, {"concept": ["circle", "red", "star"]}, 24),
    ("rank", RANK, {"robust": 1, "concept": ["circle", "red"]}, 32),
    ("rank", RANK, {"concept": ["circle", "square", "star", "heart", "cross",
     "red", "blue", "green", "cyan"]}, 64),
    ("alpha", "alpha = rank", {}, 8),
    ("alpha", "alpha = rank", {"rank": 5}, 5),
    ("attention_steps", "or 0 where the tokenizer knows less than 500 words", {}, 0),
    ("null_space", "0.999, 0.99 with --erase-from, or 0.97 with --robust", {}, 0.999),
    ("null_space", "0.999, 0.99 with --erase-from, or 0.97 with --robust", {"erase_from": "striped"}, 0.99),
    ("null_space", "0.999, 0.99 with --erase-from, or 0.97 with --robust", {"robust": 1}, 0.97),
    ("null_space", "It needs --adapter-type lora or none", {"adapter_type": "lokr"}, 0.0),
    ("closed_form", "left out: yes, but with --attention-steps", {}, True),
    ("closed_form", "left out: yes, but with --attention-steps", {"attention_steps": 5}, False),
    ("closed_form", "It needs --adapter-type lora or none, and --objective esd", {"adapter_type": "loha"}, False),
    ("closed_form", "It needs --adapter-type lora or none, and --objective esd", {"objective": "contrastive"}, False),
    ("trajectories", "4 + 4 for each concept", {}, 8),
    ("trajectories", "4 + 4 for each concept", {"concept": ["circle", "red", "star"]}, 16),
    ("trajectories", "three times that with --erase-from", {"erase_from": "striped"}, 24),
    ("trajectories", "with another scope or adapter than the defaults", {"scope": "esd-x"}, 24),
    ("trajectories", "three times that with", {"null_space": 0.0}, 24),
    ("trajectories", "with another scope or adapter than the defaults", {"adapter_type": "none"}, 24),
    ("preservation_trajectories", "one for each prompt", {}, 0),
    ("preservation_trajectories", "one for each prompt", {"preserve": ["a star", "red"]}, 2),
    ("num_inference_steps", "25, or 4 for few-step models", {}, 25),
    ("guidance_scale", "3, or 1 (none) for models that are made to go without", {}, 3.0),
    ("buffer_refresh_interval", "0 with teacher rollouts, 25 with student rollouts", {}, 0),
    ("buffer_refresh_interval", "0 with teacher rollouts, 25 with student rollouts", {"rollout": "student"}, 25),
    ("preservation_ratio", SHARE, {}, 0.125),
    ("preservation_ratio", SHARE, {"erase_from": "striped"}, 0.25),
    ("preservation_ratio", SHARE, {"robust": 1}, 0.5),
    ("preservation_ratio", "The share of each batch", {"train_batch_size": 1}, 0.0),
    ("max_train_steps", "otherwise 20 + 20 for each concept", {}, 40),
    ("max_train_steps", "20 + 20 for each concept", {"concept": ["circle", "red", "star"]}, 80),
    ("max_train_steps", "8 times that with --erase-from", {"erase_from": "striped"}, 320),
    ("max_train_steps", "with another scope or adapter than the defaults", {"scope": "esd-x"}, 320),
    ("max_train_steps", "with another scope or adapter than the defaults", {"adapter_type": "loha"}, 320),
    ("max_train_steps", "with --robust N instead 1 + 2 N times", {"robust": 3}, 7 * 40),
    ("max_train_steps", "contrastive: 10 epochs", {"objective": "contrastive"}, 64 * 10 // 32),
    ("max_train_steps", "contrastive: 10 epochs", {"objective": "contrastive", "train_batch_size": 7}, math.ceil(640 / 7)),
    ("train_batch_size", SAMPLES, {}, 8),
    ("train_batch_size", SAMPLES, {"objective": "contrastive"}, 32),
    *((name, says, {"augment_prompts": True, **options}, value) for name, says, options, value in (
        ("train_batch_size", "12 with --augment-prompts", {}, 12),
        ("max_train_steps", "80 + 80 for each concept with --augment-prompts", {"concept": ["circle", "red"]}, 240),
        ("learning_rate", "0.003 for an adapter with --augment-prompts", {}, 0.003),
        ("learning_rate", "otherwise 0.001", {"adapter_type": "none"}, 0.001),
        ("preservation_ratio", "1/3 with --augment-prompts", {}, 1 / 3),
        ("rank", RANK, {}, 16),
        ("scope", "esd-x-ff with --attention-steps or --augment-prompts", {}, "esd-x-ff"),
        ("null_space", "0 with --attention-steps or --augment-prompts", {}, 0.0),
        ("closed_form", "yes, but with --attention-steps or --augment-prompts", {}, False),
        ("negative_guidance", "with --attention-steps or --augment-prompts 0.5", {"map_to": "square"}, 0.5),
    )),
    ("augment_prompts", "its tokenizer knows 500 words", {}, False),
    ("learning_rate", "0.01 for a LoRA on esd-x-strict under --null-space", {}, 0.01),
    ("learning_rate", "otherwise 0.001", {"scope": "esd-x"}, 0.001),
    ("learning_rate", "otherwise 0.001", {"adapter_type": "none"}, 0.001),
    ("learning_rate", "otherwise 0.001", {"null_space": 0.0}, 0.001),
    ("learning_rate", "0.0001 with --objective contrastive", {"objective": "contrastive"}, 0.0001),
    ("validation_steps", "a fifth of all steps", {"validation_prompt": "circle"}, 8),
    ("validation_steps", "those of --attention-steps included", {"validation_prompt": "circle", "attention_steps": 7,
     "max_train_steps": 5}, 3),
    ("per_device_batch_size", "left out: all", {}, 8),
    ("per_device_batch_size", "left out: all", {"train_batch_size": 5}, 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says", "options", "value"), ROWS, ids=lambda x: str(x)[:40])
def test_defaults_are_the_figures_that_the_help_names(name, says, options, value, shapes):
    (group,) = (group for group, kind in groups_of(EraseConfig).items() if name in kind.model_fields)
    said = " ".join(groups_of(EraseConfig)[group].model_fields[name].description.split())
    assert says in said
    assert resolve(config(**options), shapes)[0].flat()[name] == value


def test_the_table_leaves_out_no_option_that_may_be_left_out():
    assert {*left_out(EraseConfig(concept="circle"))} <= {name for name, *_ in ROWS}


def test_a_concept_that_is_mapped_by_itself_says_so_itself(shapes):
    """So the group's η, which the others have, stays what the help says."""
    resolved, _ = resolve(config(**MAPPED), shapes)
    assert [c.negative_guidance for c in resolved.prompts.concept] == [0.0, None]
    assert resolved.prompts.negative_guidance == 1.0
    assert [*map(resolved.prompts.eta_of, resolved.prompts.concept)] == [0.0, 1.0]


def test_epochs_are_of_the_references_in_the_folder(shapes, tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    resolved, _ = resolve(config(objective="contrastive", reference=tmp_path, train_batch_size=4), shapes)
    assert resolved.training.max_train_steps == math.ceil(3 * 10 / 4)
    (tmp_path / "0.png").write_text("no image")
    with pytest.raises(UserError, match=r"--reference .*0.png cannot be read as an image"):
        resolve(config(objective="contrastive", reference=tmp_path), shapes)


@pytest.mark.parametrize(
    ("name", "steps", "scale"),
    [
        ("sdxl", 25, 3.0),
        ("sdxl turbo", 4, 1.0),
        ("flux dev", 25, 1.0),
        ("flux schnell", 4, 1.0),
        ("z-image", 25, 5.0),
        ("z-image turbo", 8, 1.0),
        ("flux.2 dev", 25, 1.0),
        ("flux.2 klein base", 25, 4.0),
        ("flux.2 klein", 4, 1.0),
    ],
)
def test_trajectories_are_those_that_the_model_is_made_for(name, steps, scale, tmp_path, monkeypatch):
    kind = next(kind for kind in ("z-image", "flux.2 klein", name) if name.startswith(kind))
    path = save_family(kind, tmp_path / "not-turbo")  # whatever the directory is called
    if kind == "z-image":
        scheduler = path / "scheduler" / "scheduler_config.json"
        shift = {"shift": 3.0 if name == "z-image turbo" else 6.0}
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | shift))
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"is_distilled": name == "flux.2 klein"}))
    draw_small(monkeypatch)
    family = open_family(str(path))
    buffer = resolve(config(model=str(path)), family)[0].buffer
    assert (buffer.num_inference_steps, buffer.guidance_scale) == (steps, scale)
    given = resolve(config(model=str(path), num_inference_steps=7, guidance_scale=0.0), family)[0].buffer
    assert (given.num_inference_steps, given.guidance_scale) == (7, 0.0)
    resolved, prompts = resolve(config(model=str(path), guidance_scale=2.0), family)
    refused = name in ("flux.2 dev", "flux.2 klein")  # whose pipelines do not guide, whatever they are told
    with pytest.raises(UserError, match=r"--guidance-scale: .* is distilled") if refused else contextlib.nullcontext():
        check_model(resolved, prompts, family)
