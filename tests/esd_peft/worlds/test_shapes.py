"""The embedded pipeline: what ships, that any diffusers user can load it, and that it draws what it is told."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from esd_peft.errors import UserError
from esd_peft.io.outputs import check_output
from esd_peft.models import open_family
from esd_peft.options.command_line import parse
from esd_peft.runtime.seeds import generator
from esd_peft.worlds import WORLDS
from esd_peft.worlds.shapes import world
from train_shapes import TrainConfig, train

EMBEDDED = WORLDS["shapes"].pipeline


def test_what_ships_is_small_plain_and_half_precision():
    files = [p for p in EMBEDDED.parent.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".txt")]
    assert sum(p.stat().st_size for p in files) <= 10e6
    weights = [p for p in files if p.suffix == ".safetensors"]
    assert len(weights) == 4
    assert {t.dtype for p in weights for t in load_file(p).values() if t.is_floating_point()} == {torch.float16}
    assert not [p for p in Path(EMBEDDED).rglob("*") if p.suffix in (".bin", ".pt", ".ckpt")]


def test_the_classifier_names_held_out_images():
    labels, pixels = world.sample(600, torch.Generator().manual_seed(2**41))
    names = WORLDS["shapes"].load_classifier().classify(pixels)
    for i, (kind, values) in enumerate(world.ATTRIBUTES.items()):
        right = [name[kind] == values[int(label[i])] for name, label in zip(names, labels, strict=True)]
        assert sum(right) / len(right) >= 0.98, kind


def test_plain_diffusers_loads_the_pipeline_and_it_draws_as_prompted():
    """A third of all full prompts, once each; benchmarks/world_quality.py does all of them on several seeds."""
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = world.full_prompts()[::3]
    images = pipe(
        prompts, num_inference_steps=25, guidance_scale=3.0, generator=generator(0, "plain"), output_type="pt"
    ).images
    names = WORLDS["shapes"].load_classifier().classify(images)
    for kind in world.ATTRIBUTES:
        right = [name[kind] == world.attributes_in(p)[kind] for name, p in zip(names, prompts, strict=True)]
        assert sum(right) / len(right) >= 0.9, kind


def test_the_world_is_seeded_and_large_enough():
    assert len(set(world.full_prompts())) == 6 * 6 * 4
    first, again, other = (world.sample(8, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first[1], again[1]) and not torch.equal(first[1], other[1])
    assert first[1].shape == (8, 3, 32, 32) and first[1].min() >= 0 and first[1].max() <= 1


def test_captions_drop_words_and_are_sometimes_empty():
    generator = torch.Generator().manual_seed(0)
    label = [0, 1, 2]  # circle, yellow, dotted
    captions = [world.caption(label, generator) for _ in range(400)]
    assert 0.05 < captions.count("") / 400 < 0.3
    named = [world.attributes_in(c) for c in captions]
    assert {len(n) for n in named} == {0, 1, 2, 3}
    assert all(n.items() <= {"shape": "circle", "colour": "yellow", "texture": "dotted"}.items() for n in named)


@pytest.mark.parametrize("prompt", [*world.full_prompts()[::29], "striped", "a circle", ""])
def test_prompts_and_attributes_are_inverse(prompt):
    assert prompt == "" or set(world.attributes_in(prompt).values()) <= set(prompt.split())
    assert open_family("shapes").unseen_words(prompt) == []


def test_unseen_words_are_found():
    assert open_family("shapes").unseen_words("a striped zebra") == ["zebra"]


def test_training_goes_into_a_directory_of_its_own(tmp_path):
    steps = {"vae": 1, "classifier": 1, "denoiser": 1}
    train(tmp_path / "new", ["tokenizer", "classifier"], steps, seed=0)
    train(tmp_path / "new", ["tokenizer"], steps, seed=0)
    check_output(tmp_path / "new", "a trained world", overwrite=True)  # it knows all files as its own
    (tmp_path / "new" / "notes.txt").write_text("precious")
    train(tmp_path / "new", ["tokenizer"], steps, seed=0)
    with pytest.raises(UserError, match=r"holds notes.txt, which esd_peft did not write"):
        check_output(tmp_path / "new", "a trained world", overwrite=True)
    (tmp_path / "mine" / "pipeline" / "tokenizer").mkdir(parents=True)
    (tmp_path / "mine" / "pipeline" / "tokenizer" / "vocab.json").write_text("precious")
    with pytest.raises(UserError, match="holds files that esd_peft did not write"):
        train(tmp_path / "mine", ["tokenizer"], steps, seed=0)
    assert (tmp_path / "mine" / "pipeline" / "tokenizer" / "vocab.json").read_text() == "precious"
    (tmp_path / "new" / "training.json").write_text("[")
    with pytest.raises(UserError, match=r"training.json is damaged"):
        train(tmp_path / "new", ["tokenizer"], steps, seed=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vae-steps", "-5"], "--vae-steps: .* greater than or equal to 1"),
        (["--seed", str(10**23)], "--seed: .* less than"),
        (["--stages", "nonsense"], "invalid choice 'nonsense'"),
        ([], "--output"),
    ],
    ids=str,
)
def test_options_of_the_training_command_are_checked(tmp_path, options, says):
    output = [] if not options else ["--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=says):
        parse(TrainConfig, "python benchmarks/train_shapes.py", [*output, *options])
