"""Which prompts a batch has."""

from dataclasses import replace

import pytest
import torch

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.prompts import augmentation
from esd_peft.prompts.plan import mentions
from esd_peft.training.prompt_sampler import PromptSampler, _preserved
from esd_peft.training.synonyms import SynonymMatch
from runs import Unloaded, prompt_table

CANDIDATES = {"fox": ["a vixen", "a dog"], "rose": ["a tulip", "a thorns"]}


@pytest.fixture
def table(few, monkeypatch):
    """Makes the prompts for concepts on the emoji pipeline, with the candidates above."""

    def nearest(encoder, concept, *_):
        encoder.add(CANDIDATES[concept])
        return CANDIDATES[concept]

    def make(**options):
        emoji = open_family("emoji")
        return prompt_table(Unloaded(*resolve(EraseConfig(device="cpu", method="layers", **options), emoji), emoji))

    monkeypatch.setattr(augmentation, "_nearest", nearest)
    return make


def draw(table, matches, erasing, preserving):
    """The texts of a large batch, erasing ones and preserving ones."""
    batch = next(PromptSampler(table, matches, erasing, preserving, torch.Generator().manual_seed(0)))
    texts = {row: text for text, row in table.rows.items()}
    said = [texts[int(row)] for row in batch.prompts]
    return said[:erasing], said[erasing:], batch


def test_no_preservation_prompt_has_a_synonym_in_it(table):
    made = table(concept="fox")
    vixen, *others = made.candidates[0]
    erasing, preserving, batch = draw(made, [SynonymMatch([vixen], others)], 2000, 4000)
    assert "a vixen" in made.unrelated and not any(mentions("vixen", text) for text in preserving)
    assert any(mentions("vixen", text) for text in erasing) and "a dog" in preserving
    assert all(mentions("fox", text) or mentions("vixen", text) for text in erasing)
    preserved = slice(2000, None)
    assert torch.equal(batch.prompts[preserved], batch.goals[preserved]), "what preserves is its own goal"
    assert torch.equal(batch.prompts[preserved], batch.neutrals[preserved])


def test_a_synonym_of_one_concept_is_not_preserved_against_another(table):
    made = table(concept=["fox", "rose"])
    fox, rose = ({c.text: c for c in group} for group in made.candidates)
    candidates = replace(rose["a thorns"], text="a vixen"), replace(rose["a tulip"], text="a vixen tulip", is_word=False)
    matches = [SynonymMatch([fox["a vixen"]], [fox["a dog"]]), SynonymMatch([], [*candidates, rose["a tulip"]])]
    assert [c.text for c in _preserved(matches)] == ["a dog", "a tulip"]
    assert [c.text for c in _preserved(matches[1:])] == ["a vixen", "a vixen tulip", "a tulip"]


def test_every_kind_of_prompt_has_its_share(table):
    made = table(concept="fox", preserve="a boat")
    vixen, dog = made.candidates[0]
    erasing, preserving, _ = draw(made, [SynonymMatch([vixen], [dog])], 9000, 9000)
    plain, contexts = ({p.prompt for p in group} for group in (made.plain[0], made.contexts[0]))
    # a fifth is the plan's own and two fifths stand in contexts, beside one fifth of words that are synonyms
    assert sum(text in plain for text in erasing) / 9000 == pytest.approx(1 / 4, abs=0.03)
    assert sum(text in contexts for text in erasing) / 9000 == pytest.approx(1 / 2, abs=0.03)
    assert sum(text in {p.prompt for p in vixen.pairs} for text in erasing) / 9000 == pytest.approx(1 / 4, abs=0.03)
    assert made.preserved == ["a boat"] and "a boat" not in made.retained
    share = preserving.count("a boat") / 9000
    assert 2 / 9 - 0.03 <= share < 0.3, "what is asked to be preserved is seen more often than the list"
    assert preserving.count("a dog") / 9000 > 0.02, "and what is near more often than what is not"
