"""The emoji world: its words, its renderer, its classifier, and its training, which resumes."""

from collections import Counter

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from esd_peft.errors import UserError
from esd_peft.worlds.emoji import Emoji, pictures
from esd_peft.worlds.emoji.classifier import LABELS
from esd_peft.worlds.emoji.vocabulary import (
    CONTEXTS,
    FRAMES,
    GROUNDED,
    GROUNDS,
    MARKED_STYLES,
    MARKS,
    NAMES,
    NOUNS,
    STYLED,
    STYLES,
    THINGS,
    Captions,
    all_words,
)
from train_emoji import make_tokenizer
from world_training import Fit


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def test_other_names_and_descriptions_do_not_say_the_name():
    assert len(THINGS) >= 200
    for thing in THINGS.values():
        words = set(thing.name.split())
        assert thing.synonyms and thing.description and thing.kind
        assert all(words.isdisjoint(other.split()) for other in (*thing.synonyms, thing.description)), thing


def test_nothing_is_named_by_accident():
    world = Emoji()
    for text in (*CONTEXTS, *FRAMES, *STYLED, *GROUNDED, *MARKS, *NOUNS):
        assert "thing" not in world.attributes_in(text.replace("{}", "")), text


def test_every_word_of_a_caption_is_one_token():
    tokenizer = make_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in all_words())
    assert len(tokenizer.tokenize("a photo of a zebra")) > 5  # another one is spelled


def test_captions_name_drop_and_describe():
    captions, labels = Captions(draws()), pictures.sample_labels(2000, draws(1)).tolist()
    made = [captions(label) for label in labels]
    assert 0.07 < made.count("") / len(made) < 0.13
    named = sum(NAMES[label[0]] in text for label, text in zip(labels, made, strict=True))
    assert 0.5 < named / len(made) < 0.7
    marked = [(label, text) for label, text in zip(labels, made, strict=True) if label[3]]
    says = sum(any(word in text for word in ("watermark", "marked", "stamp")) for _, text in marked)
    assert 0.35 < says / len(marked) < 0.6
    assert {STYLES[label[1]] for label, _ in marked} == {*MARKED_STYLES}


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("an ink hot dog on a blue background", {"thing": "hot dog", "style": "ink", "ground": "blue"}),
        ("a red apple", {"thing": "red apple"}),
        ("a Fox, glossy style, with a watermark", {"thing": "fox", "style": "glossy", "mark": "watermark"}),
        ("a blue flat key in front of a pink wall", {"thing": "key", "style": "flat", "ground": "pink"}),
        ("watermark", {"mark": "watermark"}),
        ("green", {"ground": "green"}),
        ("a foxy catalogue", {}),
        ("", {}),
    ],
    ids=str,
)
def test_what_a_text_names(text, labels):
    assert Emoji().attributes_in(text) == labels


def test_prompts_ask_for_what_they_are_to_measure():
    world = Emoji()
    for prompt in world.paraphrases({"thing": "fox"}, 40, draws()):
        assert prompt.labels["thing"] == "fox" and world.attributes_in(prompt.text) == prompt.labels
    for prompt in world.synonyms({"thing": "fox"}, 40, draws()):
        assert prompt.labels["thing"] == "fox" and "fox" not in prompt.text.split()
    for prompt in world.paraphrases({"style": "ink"}, 40, draws()):
        assert prompt.labels["style"] == "ink" and prompt.labels["thing"] in NAMES
    implicit = world.implicit({"mark": "watermark"}, 40, draws())
    assert {prompt.labels["style"] for prompt in implicit} == {*MARKED_STYLES}
    assert not any("watermark" in prompt.text for prompt in implicit)
    assert all("animal" in prompt.text for prompt in world.implicit({"thing": "fox"}, 40, draws()))
    texts = Counter(prompt.text for prompt in world.paraphrases({"thing": "owl"}, 40, draws()))
    assert len(texts) > 30


def test_the_classifier_names_what_is_drawn_anew():
    labels, images = pictures.sample(1024, draws(2**40))
    seen = Emoji().load_classifier().classify(images)
    for i, (domain, names) in enumerate(LABELS.items()):
        right = sum(found.get(domain, "") == names[int(label[i])] for found, label in zip(seen, labels, strict=True))
        assert right / len(labels) >= 0.97, domain


def test_images_depend_on_the_seed_and_marks_are_seen():
    labels = torch.tensor([[NAMES.index("fox"), STYLES.index("flat"), GROUNDS.index("blue"), marked] for marked in (0, 1)])
    first, again, other = (pictures.render(labels, draws(seed)) for seed in (0, 0, 1))
    assert first.shape == (2, 3, 32, 32) and torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() <= 1
    assert (first[1, :, 24:, 20:] < 0.2).float().mean() > (first[0, :, 24:, 20:] < 0.2).float().mean()


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    """Three steps, a stop, and the rest; against all steps in one go."""

    def fit(state):
        torch.manual_seed(0)
        generator, model = draws(5), nn.Linear(4, 4)
        average = nn.Linear(4, 4)

        def loss():
            return (model(torch.randn(8, 4, generator=generator)) - 1).square().mean()

        return Fit("test", model, 8, 1e-2, generator, state, save_every=3, average=average), model, loss

    whole, model, loss = fit(None)
    losses = [*whole.run(loss)]
    state = tmp_path / "state.pt"
    stopped, _, loss = fit(state)
    run = stopped.run(loss)
    begun = [next(run) for _ in range(4)]
    assert begun == losses[:4] and state.exists()
    again, resumed, loss = fit(state)
    assert [*again.run(loss)] == losses[3:]
    assert torch.equal(resumed.weight, model.weight) and torch.equal(again.average.weight, whole.average.weight)
    assert not state.exists()
    stopped, _, loss = fit(state)
    run = stopped.run(loss)
    for _ in range(4):
        next(run)
    other = Fit("test", nn.Linear(4, 4), 9, 1e-2, draws(), state)
    with pytest.raises(UserError, match="of another training"):
        next(other.run(loss))


def test_plain_diffusers_loads_the_pipeline_and_it_draws_as_prompted():
    """A thirtieth of all full prompts, once each; benchmarks/world_quality.py does all of them."""
    world = Emoji()
    pipe = StableDiffusionPipeline.from_pretrained(world.pipeline, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = world.full_prompts()[::31]
    texts = [prompt.text for prompt in prompts]
    images = pipe(texts, num_inference_steps=20, guidance_scale=3.0, generator=draws(), output_type="pt").images
    seen = world.load_classifier().classify(images)
    for domain, least in {"thing": 0.92, "style": 0.75, "ground": 0.97}.items():
        right = [found.get(domain) == prompt.labels[domain] for found, prompt in zip(seen, prompts, strict=True)]
        assert sum(right) / len(right) >= least, domain


def test_what_ships_is_small_plain_and_half_precision():
    assert sum(path.stat().st_size for path in Emoji.pipeline.parent.rglob("*") if path.is_file()) <= 25e6
    weights = [*Emoji.pipeline.rglob("*.safetensors")]
    assert len(weights) == 3
    assert {t.dtype for path in weights for t in load_file(path).values() if t.is_floating_point()} == {torch.float16}


def test_every_thing_has_neighbours():
    world = Emoji()
    for name in NAMES:
        near = world.neighbours("thing", name)
        assert len(near) >= 6 and name not in near and {*near} <= {*NAMES}
    assert "lion" in world.neighbours("thing", "tiger")
