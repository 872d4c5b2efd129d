"""The peers' closed forms in benchmarks do what their papers say, on the embedded pipeline."""

import importlib
from pathlib import Path

import pytest
import torch

from esd_peft.models import open_family

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("closed_forms")


@pytest.fixture
def family():
    return open_family("shapes")


def embeddings(family, *texts):
    return family.encode([*texts], torch.device("cpu"), torch.float32)["encoder_hidden_states"]


def test_uce_moves_the_last_word_as_far_as_its_ridge_lets_it(module, family):
    """At the minimum of |W'c − Wg|² + λ|W' − W|² for one key c and one target g: W'c = W (|c|²g + λc) / (|c|² + λ)."""
    edited = module.uce(family, ["circle"], "current")
    circle, null = embeddings(family, "circle", "")
    key, goal = circle[1], null[0]  # their scripts take the token before the last one: of "" that is the first
    weight = family.load_denoiser(torch.float32).state_dict()[LAYER]
    square = key @ key
    expected = weight @ (square * goal + 0.5 * key) / (square + 0.5)
    torch.testing.assert_close(edited.state_dict()[LAYER] @ key, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("edit", "options", "layers", "first"),
    [("uce", {"form": "old", "retain": True}, ("to_k", "to_v"), 0.5), ("speed", {}, ("to_v",), 1e-3)],
    ids=["UCE", "SPEED"],
)
def test_only_these_layers_change_and_the_null_prompt_hardly(module, family, edit, options, layers, first):
    edited = module.CLOSED_FORMS[edit](family, ["circle"], **options)
    before, after = family.load_denoiser(torch.float32).state_dict(), edited.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and {name.split(".attn2.")[1] for name in changed} == {f"{layer}.weight" for layer in layers}
    circle, null = embeddings(family, "circle", "")
    change = (after[LAYER] - before[LAYER]).T
    assert (null @ change).norm() < 0.5 * (circle @ change).norm()
    assert (null[0] @ change).norm() < first * (circle @ change).norm(), "which SPEED holds exactly"
