"""Text encoders and tokenizers in the form that every version of transformers reads."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from esd_peft import EraseConfig, erase
from esd_peft.errors import UserError
from esd_peft.models import open_family, text_parts
from esd_peft.models.text_parts import control_tokens, whole_words, word_tokens, write_for_every_version
from esd_peft.worlds import WORLDS
from runs import SHORTEST as QUICK

EMBEDDED = WORLDS["shapes"].pipeline


def text_names(path):
    return {name for file in path.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<|endoftext|>", r"has the tokenizer's own <\|endoftext\|> in it"),
        ("a circle <|ENDOFTEXT|><|startoftext|>", r"has the tokenizer's own <\|startoftext\|> in it"),
        (" ", "no tokenizer of this model has tokens for it"),
    ],
)
def test_texts_that_no_tokenizer_sees(tmp_path, text, says):
    family = open_family("shapes")
    with pytest.raises(UserError, match=f"^--concept .*{says}"):
        family.check_seen({"--preserve": ["a square!"], "--concept": ["circle", text]})
    if text.strip():
        for option in ("concept", "preserve", "map_to", "validation_prompt"):
            words = {"concept": "circle", option: text} | QUICK | {"num_validation_images": 1}
            with pytest.raises(UserError, match=f"^--{option.replace('_', '-')} .*"):
                erase(EraseConfig(output=tmp_path / "out", **words))
        assert not (tmp_path / "out").exists()


def test_what_fills_up_may_be_a_word():
    """Stable Diffusion 2 fills up with exclamation marks."""
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED, subfolder="tokenizer", pad_token="!")
    assert control_tokens(tokenizer, "circle!") == [] and word_tokens(tokenizer, "!")
    assert control_tokens(tokenizer, "circle<|endoftext|>") == ["<|endoftext|>"]


def test_a_text_encoder_that_says_nothing(small_sd, tmp_path):
    model = shutil.copytree(small_sd, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="its text encoders answer the same to 'circle' and ''"):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", **QUICK))
    assert not [path for path in tmp_path.iterdir() if path != model]


def test_what_ships_has_the_old_names_and_both_kinds_of_tokenizer_files():
    assert all(name.startswith("text_model.") for name in text_names(EMBEDDED / "text_encoder"))
    fast = json.loads((EMBEDDED / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((EMBEDDED / "tokenizer" / "vocab.json").read_text()) == fast["vocab"]
    lines = (EMBEDDED / "tokenizer" / "merges.txt").read_text().splitlines()
    assert lines[0].startswith("#version") and [line.split() for line in lines[1:]] == fast["merges"]


@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_any_pipeline_is_written_so_and_loads_as_before(small_sd, tmp_path, shard):
    path = shutil.copytree(small_sd, tmp_path / "sd")
    before = CLIPTextModel.from_pretrained(path / "text_encoder")
    shutil.rmtree(path / "text_encoder")
    before.save_pretrained(path / "text_encoder", max_shard_size=shard)
    assert "embeddings.token_embedding.weight" in text_names(path / "text_encoder")  # as transformers writes them now
    assert bool([*path.glob("text_encoder/*.index.json")]) == (shard == "20KB")
    words = CLIPTokenizer.from_pretrained(path / "tokenizer")
    write_for_every_version(path)
    assert all(name.startswith("text_model.") for name in text_names(path / "text_encoder"))
    assert not [*path.rglob("*.renamed")]
    after, loaded = CLIPTextModel.from_pretrained(path / "text_encoder", output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    expected = before.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in after.state_dict().items())
    again = CLIPTokenizer.from_pretrained(path / "tokenizer")
    assert again.get_vocab() == words.get_vocab() and again("a striped zebra!") == words("a striped zebra!")
    StableDiffusionPipeline.from_pretrained(path)


def test_what_is_in_that_form_stays_as_it_is(tmp_path):
    path = shutil.copytree(EMBEDDED, tmp_path / "sd")
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}
    write_for_every_version(path)
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def test_a_projection_beside_the_encoder_keeps_its_name():
    names = ["encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.position_embedding.weight", "text_projection.weight"]
    assert [text_parts._old_name(name) for name in names] == [f"text_model.{names[0]}", *names[1:]]


def test_whole_words_of_every_kind_of_vocabulary_in_its_order():
    clip = {"fox</w>": 3, "tiger</w>": 2, "ti": 1, "a</w>": 0, "x9z</w>": 5, "été</w>": 6, "<|endoftext|>": 7, "Cat</w>": 8}
    assert whole_words(clip) == ["tiger", "fox"]
    assert whole_words({"▁fox": 1, "fox": 0, "▁": 2, "▁owl": 3, "</s>": 4}) == ["fox", "owl"]
    assert whole_words({"Ġfox": 0, "fox": 1, "Ġfox9": 2}) == ["fox"]
    assert whole_words({}) == []
