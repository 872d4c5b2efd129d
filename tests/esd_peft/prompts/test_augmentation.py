"""Many prompts of a concept: what erases, what preserves, and what may be a synonym."""

from dataclasses import replace

import pytest

import runs
from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.prompts import augmentation as module
from esd_peft.prompts.augmentation import known_names
from esd_peft.prompts.plan import mentions
from runs import Unloaded, prompt_table

FEW = replace(module.MANY_PROMPTS, contexts=24, fewest=24, held=24, phrases=16)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer prompts, so that a moment is enough."""
    for name, value in {"WORDS": 300, "NEAR_WORDS": 4, "MANY_PROMPTS": FEW}.items():
        monkeypatch.setattr(module, name, value)


def augmented(**options):
    """The pipeline, the plan and its table."""
    emoji = open_family("emoji")
    run = Unloaded(*resolve(EraseConfig(device="cpu", method="layers", **options), emoji), emoji)
    return emoji, run.prompts, prompt_table(run)


def words_of(text):
    return text.lower().split()


def test_what_erases_names_the_concept_and_what_preserves_does_not(monkeypatch):
    emoji, plan, made = augmented(concept="red apple")
    contexts = made.contexts[0]
    assert 20 <= len(contexts) <= 24 and made.plain == plan.concept_pairs
    assert all(
        mentions("red apple", p.prompt) and not mentions("red apple", p.neutral) and p.anchor_prompt == p.neutral
        for p in contexts
    )
    assert len({p.prompt for p in contexts}) > 20, "in different contexts"
    assert not any(mentions("red apple", text) for text in made.unrelated + made.retained)
    assert {"a red", "an apple" if "an apple" in made.rows else "a apple"} & {*made.unrelated}, "a part of its name may stay"
    words = [c.text for c in made.candidates[0] if c.is_word]
    phrases = [c.text for c in made.candidates[0] if not c.is_word]
    sharing = [c.text for c in made.candidates[0] if c.shares_word]
    assert len(words) == 4 and 16 <= len(phrases) <= 16 + module.SHARING
    assert all(4 <= len(c.pairs) <= 6 for c in made.candidates[0])
    assert len(sharing) >= 16 and all(("red" in words_of(text)) != ("apple" in words_of(text)) for text in sharing)
    assert {"a blue apple", "a green apple"} & {*sharing}, "what a common modifier makes of its noun is among these"
    assert all(candidate.text in pair.prompt for candidate in made.candidates[0] for pair in candidate.pairs)
    assert {*made.rows} >= {p.anchor_prompt for c in made.candidates[0] for p in c.pairs}
    assert all(count <= most for count, most in emoji.token_counts([*made.rows])), "and the text encoder reads all of them"
    assert len(made.embeds["encoder_hidden_states"]) == len(made.rows)
    monkeypatch.setattr(runs, "_TABLES", {})
    again = augmented(concept="red apple")[2]
    assert again.rows == made.rows and again.contexts == made.contexts


def test_what_is_near_is_looked_for_among_all_words_of_the_vocabulary_and_names(monkeypatch):
    monkeypatch.setattr(module, "MANY_PROMPTS", replace(FEW, near=32))
    emoji, _, made = augmented(concept="fox")
    rare = emoji.whole_words()[300:]
    assert "vixen" in rare and "a vixen" in [c.text for c in made.candidates[0] if c.is_word]
    near = {*made.unrelated} & {*rare}
    assert 16 <= len(near) <= 32, "which are preserved, too"
    assert not near & {*made.words}, "but stand in no context"
    assert emoji.load_part("tokenizer").model_max_length == 24
    names_known = known_names(emoji)
    assert "Paris" in names_known and "Pablo Picasso" not in names_known, "which this tokenizer spells"


def test_a_mapped_concept_becomes_its_goal_and_one_that_is_erased_from_something_has_no_synonyms():
    *_, made = augmented(concept="fox", map_to="owl")
    assert all(p.anchor and mentions("owl", p.anchor_prompt) and not mentions("owl", p.neutral) for p in made.contexts[0])
    assert not any(mentions("owl", text) for text in made.unrelated)
    *_, made = augmented(concept="ink", erase_from="fox")
    assert made.candidates == [[]] and all(mentions("fox", p.anchor_prompt) for p in made.contexts[0])


def test_the_user_knows_better():
    *_, made = augmented(concept="fox", also_erase="sly red hunter", preserve="vixen")
    assert sum("a sly red hunter" in p.prompt for p in made.contexts[0]) == 24 // 8
    assert any(p.prompt == "a sly red hunter" for p in made.plain[0])
    assert not any(mentions("vixen", c.text) for c in made.candidates[0]) and "vixen" in made.preserved
    assert "vixen" not in made.retained
    assert not any(mentions("sly red hunter", text) for text in made.unrelated + made.retained)
