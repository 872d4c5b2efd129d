"""Words with embeddings of their own, against words that the text encoder has."""

import pytest
import torch

from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import load_encoders
from esd_peft.models import open_family
from families import save_family

CPU = torch.device("cpu")


def encode(family, pipe, prompts):
    return family.encode_prompts(pipe, prompts, CPU)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux dev", "pixart"])  # Gemma splits what is beside a new word
def test_a_new_word_with_an_old_words_embedding_reads_like_it(kind, small_sd, tmp_path):
    family = open_family(str(small_sd if kind == "sd" else save_family(kind, tmp_path / "model")))
    plain = load_encoders(family, CPU, torch.float32)
    pipe = load_encoders(family, CPU, torch.float32)
    tokens = NewTokens(pipe, ["<new>", "<other>"])
    tokens.start_from("circle")
    prompts = ["a circle", "red"]
    with torch.no_grad(), tokens.known():
        seen = encode(family, pipe, ["a <new>", "red"])
    with torch.no_grad():
        expected = encode(family, plain, prompts)
    tokenizers = [part for name, part in pipe.components.items() if "tokenizer" in name and part is not None]
    alike = all(len(t("a <new>").input_ids) == len(t("a circle").input_ids) for t in tokenizers)
    alike = alike and all(len(t.tokenize("circle")) == 1 for t in tokenizers)
    assert alike or kind in ("pixart", "sd3", "flux dev")
    for name, value in expected.items():
        torch.testing.assert_close(seen[name][1], value[1])
        if alike:  # some tokenizers put another number of tokens there
            torch.testing.assert_close(seen[name][0], value[0])


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux dev", "pixart", "sana"])
def test_every_encoder_gives_gradients(kind, small_sd, tmp_path):
    family = open_family(str(small_sd if kind == "sd" else save_family(kind, tmp_path / "model")))
    pipe = load_encoders(family, CPU, torch.float32)
    tokens = NewTokens(pipe, ["<new>"])
    with tokens.known():
        embeds = encode(family, pipe, ["a <new>"])
        sum(value.square().sum() for value in embeds.values() if value.is_floating_point()).backward()
    for embedding in tokens.embeddings.values():
        assert embedding.grad is not None and embedding.grad.abs().sum() > 0


def test_words_of_two_kinds_do_not_disturb_each_other(small_sd):
    family = open_family(str(small_sd))
    pipe = load_encoders(family, CPU, torch.float32)
    first, second = NewTokens(pipe, ["<one>", "<two>"]), NewTokens(pipe, ["<three>"])
    first.start_from("circle")
    second.start_from("square")
    with torch.no_grad(), first.known(), second.known():
        rows = encode(family, pipe, ["<one> <three> <two>", "circle square circle"])["encoder_hidden_states"]
    torch.testing.assert_close(rows[0], rows[1])


def test_a_tokenizer_that_is_part_of_a_processor_learns_words_too(small_sd):
    """As FLUX.2 dev's is, whose processor takes images beside text."""

    class Processor:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    pipe = load_encoders(open_family(str(small_sd)), CPU, torch.float32)
    tokenizer = pipe.tokenizer
    assert tokenizer.convert_tokens_to_ids("<new>") == tokenizer.unk_token_id
    tokens = NewTokens(StandIn({"tokenizer": Processor(tokenizer), "text_encoder": pipe.text_encoder}), ["<new>"])
    tokens.start_from("circle")
    assert tokenizer.convert_tokens_to_ids("<new>") == len(tokenizer) - 1


class StandIn:
    """A pipeline with these components."""

    def __init__(self, components):
        self.components = components
