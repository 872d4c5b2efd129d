"""The teacher probe: which words are the concept under another name."""

import pytest

from esd_peft.prompts import augmentation
from esd_peft.prompts.augmentation import Candidate
from esd_peft.training.synonyms import SynonymMatch, neighbours
from runs import method_of, prepare

CANDIDATES = {"fox": ["a vixen", "a dog", "a heart", "a sly"], "rose": ["a valentine", "a tulip", "a thorns"]}


@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_the_teacher_knows_which_words_are_synonyms(few, monkeypatch, method):
    def nearest(encoder, concept, *_):
        encoder.add(CANDIDATES[concept])
        return CANDIDATES[concept]

    monkeypatch.setattr(augmentation, "_nearest", nearest)
    source = method_of(prepare("emoji", concept=["fox", "rose"], rank=2, method=method)).source
    next(source)
    fox, rose = source.matches
    assert [c.text for c in fox.synonyms] == ["a vixen", "a sly"]
    assert [c.text for c in fox.others] == ["a dog", "a heart"]
    assert [c.text for c in rose.synonyms] == ["a valentine", "a thorns"]
    assert [c.text for c in rose.others] == ["a tulip"], "though along one of its trajectories it looks like a rose"
    assert fox.nfe == 2 * (4 + 2 * 2), "what is nothing like it along the first is not looked at again"


def test_neighbours_are_words_that_are_preserved_the_nearest_of_each_concept_first():
    fox, rose = (
        [Candidate(text, [], " " not in text) for text in texts]
        for texts in (["dog", "sly", "wolf"], ["tulip", "sly", "red tulip"])
    )
    assert neighbours([SynonymMatch([], fox), SynonymMatch([fox[1]], rose)]) == ["dog", "tulip", "sly", "wolf"]


def test_a_word_of_the_concepts_own_name_is_no_synonym(few, monkeypatch):
    """Along the trajectories of "green apple" the teacher predicts nearly the same for "apple": 0.98."""
    candidates = ["a apple", "a granny smith", "a red apple"]

    def nearest(encoder, concept, *_):
        encoder.add(candidates)
        return candidates

    monkeypatch.setattr(augmentation, "_nearest", nearest)
    source = method_of(prepare("emoji", concept=["green apple"], rank=2, method="layers")).source
    next(source)
    (match,) = source.matches
    sides = [[c.text for c in side] for side in (match.synonyms, match.undecided, match.others)]
    assert sides == [["a granny smith"], ["a apple"], ["a red apple"]]
    assert neighbours([match]) == ["a red apple"], "which shares a word, and so is diagnosed"
    texts = {row: text for text, row in source.table.rows.items()}
    drawn = [texts[int(row)] for _ in range(40) for row in next(source.prompts).prompts]
    assert "a red apple" in drawn and "a apple" not in drawn
