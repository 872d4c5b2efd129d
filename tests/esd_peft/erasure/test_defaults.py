"""What stands for an option that was left out: one value, known before the run, which the files it writes hold."""

import contextlib
import json
import math

import pytest
import torch
import yaml

from esd_peft import EraseConfig, UserError
from esd_peft.erasure.checks import check_model
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options.base import Auto, Options, groups_of, readers
from esd_peft.options.command_line import parse
from families import draw_small, save_family


def left_out(config: EraseConfig) -> list[str]:
    """The options that have no value: after `resolve` only those that the run does not read."""
    found = []
    for group, kind in groups_of(type(config)).items():
        options: Options = getattr(config, group)
        found += [n for n, field in kind.model_fields.items() if Auto in field.metadata and getattr(options, n) is None]
    return found


def unread_by(method: str) -> set[str]:
    """The options that the method does not read."""
    fields = [pair for group in groups_of(EraseConfig).values() for pair in group.model_fields.items()]
    return {name for name, field in fields if readers(field) and method not in readers(field)}


CONFIGS = {  # and what else stays left out, beside options that the method does not read
    "the defaults": ({}, set()),
    "several concepts": ({"concept": ["circle", "red", "striped"]}, set()),
    "a concept of its own": ({"concept": ["star", {"name": "circle", "map_to": "square", "weight": 2}]}, set()),
    "map_to": ({"map_to": "square"}, set()),
    "negative_guidance and map_to": ({"map_to": "square", "negative_guidance": 0.5}, set()),
    "erase_from": ({"concept": "striped", "erase_from": "circle"}, set()),
    "layers": ({"method": "layers"}, set()),
    "denoiser": ({"method": "denoiser"}, set()),
    "denoiser, several concepts": ({"method": "denoiser", "concept": ["circle", "red"]}, set()),
    "no adapter": ({"adapter_type": "none"}, {"rank", "alpha"}),
    "loha": ({"adapter_type": "loha"}, set()),
    "lokr of all layers": ({"adapter_type": "lokr", "scope": "full", "alpha": 3.0}, set()),
    "esd-u": ({"scope": "esd-u"}, set()),
    "no null space": ({"closed_form": False}, set()),
    "student rollouts": ({"rollout": "student"}, set()),
    "a buffer of one step": ({"buffer_refresh_interval": 1}, set()),
    "contrastive": ({"method": "contrastive"}, set()),
    "contrastive, several concepts": ({"method": "contrastive", "concept": ["circle", "red"]}, set()),
    "one sample a step": ({"train_batch_size": 1}, set()),
    "preserve": ({"preserve": ["a star", "a red square"]}, set()),
    "offload": ({"offload": True, "gradient_checkpointing": True}, set()),
    "half precision": ({"dtype": "bfloat16", "quantize": "nf4"}, set()),
}


@pytest.fixture(scope="module")
def shapes():
    return open_family("shapes")


def config(**options):
    return EraseConfig(**({"concept": "circle", "device": "cpu"} | options))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resolved_config_has_all_values_and_is_read_again_as_it_is(name, shapes, tmp_path):
    options, absent = CONFIGS[name]
    given = config(**options)
    resolved, prompts = resolve(given, shapes)
    assert {*left_out(resolved)} - unread_by(resolved.training.method) == absent
    assert resolve(resolved, shapes) == (resolved, prompts)
    again = EraseConfig(**yaml.safe_load(resolved.to_yaml()))
    assert again == resolved and again.to_yaml() == resolved.to_yaml(), "8.0 is not written as 8"
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml(), encoding="utf-8")
    assert parse(EraseConfig, "erase", ["--config", str(file)]) == resolved
    assert EraseConfig(**resolved.flat()) == resolved
    kept = {name: value for name, value in given.flat().items() if name in options and name not in ("concept", "scope")}
    assert resolved.flat() | kept == resolved.flat(), "what was given stays"


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("contrastive")])
def test_the_prompts_are_those_of_the_resolved_config(name, shapes):
    resolved, prompts = resolve(config(**CONFIGS[name][0]), shapes)
    etas = [{pair.eta for pair in pairs} for pairs in prompts.concept_pairs]
    assert etas == [{resolved.prompts.eta_of(concept)} for concept in resolved.prompts.concept]


def test_left_out_names_every_option_that_a_default_stands_for():
    optional = {
        name
        for group in groups_of(EraseConfig).values()
        for name, field in group.model_fields.items()
        if "left out: " in " ".join(field.description.lower().split()) and field.default is None
    }
    # of these some stay left out: the value says what is not done, or not named
    stays = {
        "map_to",
        "revision",
        "resolution",
        "max_sequence_length",
        "variant",
        "checkpoint_config",
        "push_to_hub",
    }
    assert {*left_out(EraseConfig(concept="circle"))} == optional - stays


def test_prompts_to_preserve_are_taken_once(shapes):
    resolved, prompts = resolve(config(preserve=["a star", "a heart", "a star"]), shapes)
    assert (
        [pair.prompt for pair in prompts.preserve]
        == prompts.user_preserved
        == resolved.prompts.preserve
        == ["a star", "a heart"]
    )
    assert resolve(EraseConfig(**yaml.safe_load(resolved.to_yaml())), shapes) == (resolved, prompts)


def test_the_device_and_the_dtype_are_those_it_runs_on(shapes):
    resolved, _ = resolve(EraseConfig(concept="circle"), shapes)
    gpu = torch.cuda.is_available()
    assert (resolved.runtime.device, resolved.runtime.dtype) == (("cuda:0", "bfloat16") if gpu else ("cpu", "float32"))
    resolved, _ = resolve(config(offload=True), shapes)
    assert resolved.runtime.compile == "off" and resolved.memory.gradient_checkpointing


MAPPED = {"concept": [{"name": "circle", "map_to": "square"}, "red"]}
RANK = "8 for each concept (16 with the methods layers and denoiser), at most 64"
ETA = "1, or for what is mapped to something 0, with the methods layers and denoiser 0.5"
SCOPE = "esd-x-ff with the methods layers and denoiser, esd-u with --unprompted-guidance, otherwise esd-x-strict"
STEPS = "150 + 50 for each concept with the method layers, 80 + 80 with denoiser, 20 + 20 with trajectories"
EIGHT_TIMES = "(8 times that with --erase-from, or with another scope or adapter than the defaults)"
SHARE = "0.5 with the method layers, 1/3 with denoiser, 0.125 with trajectories (0.25 with --erase-from)"
SAMPLES = "32 with the methods layers and contrastive, 12 with denoiser, 8 with trajectories"
RATE = (
    "0.003 for an adapter with the methods layers and denoiser, 0.01 for a LoRA on esd-x-strict under --closed-form, 0.0001"
)
MANY = ["circle", "square", "star", "heart", "cross", "red", "blue", "green", "cyan"]
LAYERS, DENOISER, CONTRASTIVE = ({"method": name} for name in ("layers", "denoiser", "contrastive"))
ROWS = [  # an option, what its help says, with which options, and the value
    ("method", "trajectories where the tokenizer knows less than 500 words", {}, "trajectories"),
    ("negative_guidance", ETA, {}, 1.0),
    ("negative_guidance", ETA, {"map_to": "square"}, 0.0),
    ("negative_guidance", ETA, DENOISER | {"map_to": "square"}, 0.5),
    ("scope", SCOPE, {}, "esd-x-strict"),
    ("scope", SCOPE, {"unprompted_guidance": 1, "closed_form": False}, "esd-u"),
    ("scope", SCOPE, LAYERS, "esd-x-ff"),
    ("scope", SCOPE, DENOISER | {"unprompted_guidance": 1}, "esd-x-ff"),
    ("rank", RANK, {}, 8),
    ("rank", RANK, LAYERS, 16),
    ("rank", RANK, DENOISER | {"concept": ["circle", "red"]}, 32),
    ("rank", RANK, {"concept": MANY}, 64),
    ("alpha", "alpha = rank", {}, 8),
    ("alpha", "alpha = rank", {"rank": 5}, 5),
    ("closed_form", "It needs --adapter-type lora or none; left out: yes", {}, True),
    ("closed_form", "It needs --adapter-type lora or none; left out: yes", {"adapter_type": "loha"}, False),
    ("rollout", "left out: mixed", {}, "mixed"),
    ("trajectories", "4 + 4 for each concept", {}, 8),
    ("trajectories", "4 + 4 for each concept", {"concept": ["circle", "red", "star"]}, 16),
    ("trajectories", "three times that with --erase-from", {"erase_from": "striped"}, 24),
    ("trajectories", "with another scope or adapter than the defaults", {"scope": "esd-x"}, 24),
    ("trajectories", "with another scope or adapter than the defaults", {"adapter_type": "none"}, 24),
    ("num_inference_steps", "25, or 4 for few-step models", {}, 25),
    ("num_inference_steps", "at most 10 with the methods layers and denoiser", {"method": "denoiser"}, 10),
    ("guidance_scale", "3, or 1 (none) for models that are made to go without", {}, 3.0),
    ("buffer_refresh_interval", "0, or 25 with student rollouts", {}, 0),
    ("buffer_refresh_interval", "0, or 25 with student rollouts", {"rollout": "student"}, 25),
    ("preservation_ratio", SHARE, {}, 0.125),
    ("preservation_ratio", SHARE, {"erase_from": "striped"}, 0.25),
    ("preservation_ratio", SHARE, LAYERS, 0.5),
    ("preservation_ratio", SHARE, DENOISER, 1 / 3),
    ("preservation_ratio", "The share of preservation prompts in each batch", {"train_batch_size": 1}, 0.0),
    ("unprompted_guidance", "left out: 0", {}, 0.0),
    ("max_train_steps", STEPS, LAYERS | {"concept": ["circle", "red"]}, 250),
    ("max_train_steps", STEPS, DENOISER | {"concept": ["circle", "red"]}, 240),
    ("max_train_steps", STEPS, {"concept": ["circle", "red", "star"]}, 80),
    ("max_train_steps", EIGHT_TIMES, {"erase_from": "striped"}, 320),
    ("max_train_steps", EIGHT_TIMES, {"scope": "esd-x"}, 320),
    ("max_train_steps", EIGHT_TIMES, {"adapter_type": "loha"}, 320),
    ("max_train_steps", "10 epochs with contrastive", CONTRASTIVE, 64 * 10 // 32),
    ("max_train_steps", "10 epochs with contrastive", CONTRASTIVE | {"train_batch_size": 7}, math.ceil(640 / 7)),
    ("train_batch_size", SAMPLES, {}, 8),
    ("train_batch_size", SAMPLES, LAYERS, 32),
    ("train_batch_size", SAMPLES, DENOISER, 12),
    ("train_batch_size", SAMPLES, CONTRASTIVE, 32),
    ("learning_rate", RATE, {}, 0.01),
    ("learning_rate", RATE, LAYERS, 0.003),
    ("learning_rate", RATE, DENOISER, 0.003),
    ("learning_rate", RATE, CONTRASTIVE, 0.0001),
    *(("learning_rate", "otherwise 0.001", options, 0.001) for options in (
        {"scope": "esd-x"}, {"adapter_type": "none"}, {"closed_form": False}, DENOISER | {"adapter_type": "none"},
    )),
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
