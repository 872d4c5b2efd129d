"""From what the options name to prompts."""

import pytest

from esd_peft.errors import UserError
from esd_peft.options.prompts import PromptOptions
from esd_peft.prompts.plan import Pair, plan_prompts
from esd_peft.worlds import WORLDS


def plan(**options):
    """For a model that draws the world of shapes."""
    return plan_prompts(PromptOptions(**options), WORLDS["shapes"])


def natural_plan(**options):
    """For a model that draws anything."""
    return plan_prompts(PromptOptions(**options), None)


def test_a_concept_in_the_papers_template():
    made = natural_plan(concept="Van Gogh", prompt_templates="bare", negative_guidance=2)
    assert made.concept_pairs == [[Pair("Van Gogh", "", eta=2.0)]]
    assert made.texts[:2] == ["", "Van Gogh"]


def test_templates_pair_the_concept_in_context_with_the_context():
    pairs = plan(concept="circle").concept_pairs[0]
    assert pairs[0] == Pair("circle", "")
    assert Pair("a red circle", "a red shape") in pairs and Pair("a picture of a circle", "") in pairs
    assert not [p for p in pairs if "circle" in p.neutral]
    natural = natural_plan(concept="Van Gogh").concept_pairs[0]
    assert Pair("a photo of Van Gogh", "a photo") in natural
    assert Pair("a mountain lake, Van Gogh", "a mountain lake") in natural


def test_other_names_are_erased_with_the_concept_and_stay_on_no_list():
    made = natural_plan(concept="cat", also_erase=["dog", "small pet that purrs"])
    pairs = made.concept_pairs[0]
    assert pairs[0] == Pair("cat", "") and made.concepts == ["cat"] and made.synonyms == [["dog", "small pet that purrs"]]
    assert {Pair("a dog", ""), Pair("a photo of small pet that purrs", "a photo")} <= {*pairs}
    assert not any("dog" in text.split() for text in made.retain), "which is on the built-in list"
    concepts = [{"name": "cat", "also_erase": ["kitty"]}, "owl"]
    assert natural_plan(concept=concepts).synonyms == [["kitty"], []]
    assert PromptOptions(concept=concepts).model_dump()["concept"][0] == {"name": "cat", "also_erase": ("kitty",)}
    sourced = natural_plan(concept="red", erase_from="car", also_erase="scarlet")
    assert Pair("scarlet car", "car") in sourced.concept_pairs[0]


def test_erase_from_pairs_the_thing_with_and_without_the_attribute():
    made = plan(concept="striped", erase_from="circle")
    assert made.concept_pairs[0][0] == Pair("striped circle", "circle")
    assert Pair("a striped red circle", "a red circle") in made.concept_pairs[0]
    assert natural_plan(concept="striped", erase_from="shirt", prompt_templates="bare").concept_pairs == [
        [Pair("striped shirt", "shirt")]
    ]


def test_erase_from_protects_the_attribute_elsewhere_and_holds_the_thing_otherwise():
    made = plan(concept="striped", erase_from="circle", preserve=["a circle on the left", "a square"])
    assert {"striped", "a striped shape", "a striped red shape", "a striped square", "a square"} <= set(made.retain)
    assert not [p for p in made.retain if "circle" in p.split()]
    held = {p.prompt for p in made.preserve}
    assert {"a circle on the left", "red circle", "wooden circle"} <= held and "striped circle" not in held
    natural = natural_plan(concept="red", erase_from="shirt")
    assert {"plain shirt", "blue shirt"} <= {p.prompt for p in natural.preserve}
    assert "red shirt" not in {p.prompt for p in natural.preserve}
    assert "a mountain lake, red" in natural.retain and not [p for p in natural.retain if "shirt" in p.split()]


def test_map_to_says_the_other_thing_in_the_same_place_and_needs_no_push():
    pairs = plan(concept="circle", map_to="square").concept_pairs[0]
    assert pairs[0] == Pair("circle", "", anchor="square", eta=0.0)
    assert Pair("a red circle", "a red shape", anchor="a red square", eta=0.0) in pairs


def test_concepts_bring_their_own_settings():
    made = plan(concept=[{"name": "circle", "negative_guidance": 3, "weight": 2}, "striped"], negative_guidance=0.5)
    assert {(p.eta, p.weight) for p in made.concept_pairs[0]} == {(3.0, 2.0)}
    assert {(p.eta, p.weight) for p in made.concept_pairs[1]} == {(0.5, 1.0)}


def test_what_names_a_concept_is_not_protected():
    made = plan(concept=["circle", "red"], preserve=["a square", "a green heart", "a blue star"])
    assert [p.prompt for p in made.preserve] == ["a square", "a green heart", "a blue star"]
    assert {"", "a square", "a green heart", "a blue star", "striped"} <= set(made.retain)
    assert not [p for p in made.retain if {"circle", "red"} & set(p.split())]
    natural = natural_plan(concept="a church")
    assert "a church" not in natural.retain and "a castle" in natural.retain


def test_concepts_do_not_stand_beside_each_other():
    """Else each would be taught to keep the other."""
    made = plan(concept=["circle", {"name": "striped", "erase_from": "square"}, "red"])
    assert Pair("a blue circle", "a blue shape") in made.concept_pairs[0]
    neutrals = {p.neutral for pairs in made.concept_pairs for p in pairs}
    assert not [p for p in [*neutrals, *made.retain] if {"circle", "red"} & set(p.split())]
    assert not [p for p in made.retain if {"striped", "square"} <= set(p.split())]


def test_articles_do_not_hide_a_concept():
    assert "circle" not in plan(concept="a circle").retain
    dogs = natural_plan(concept="dog")
    assert "a dog" not in dogs.retain
    assert not [p for p in dogs.concept_pairs[0] if "dog" in p.neutral]


@pytest.mark.parametrize("blank", ["\u200b", "\u200b \ufeff", "\ufe0f", " "])
@pytest.mark.parametrize("option", ["concept", "also_erase", "erase_from", "map_to", "preserve"])
def test_what_cannot_be_seen_names_nothing(option, blank):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')}( name)?: (name what|say what)"):
        PromptOptions(**{"concept": "circle", option: blank})
    assert natural_plan(concept="circle \u200b").concepts == ["circle \u200b"]  # it is beside what can


def test_prompts_to_preserve_are_bounded():
    many = [f"a thing {i}" for i in range(10_000)]
    assert len(natural_plan(concept="circle", preserve=many).user_preserved) == 10_000
    with pytest.raises(UserError, match=r"--preserve names 10,001 prompts, each with .*; 10,000 at most"):
        natural_plan(concept="circle", preserve=[*many, "a square"])


def test_prompts_that_are_cut_short_teach_nothing_and_hold_nothing():
    plan = plan_prompts(PromptOptions(concept="van gogh", preserve=["a " * 9 + "dog"]), None)
    short = plan.untruncated(lambda texts: [text for text in texts if len(text.split()) <= 5])
    assert short.concept_pairs[0][0] == plan.concept_pairs[0][0], "the plain pair"
    assert 1 < len(short.concept_pairs[0]) < len(plan.concept_pairs[0])
    assert all(len(pair.prompt.split()) <= 5 for pair in short.concept_pairs[0])
    assert short.retain == [text for text in plan.retain if len(text.split()) <= 5] != plan.retain
    assert plan.untruncated(list) == plan
    nothing = plan.untruncated(lambda texts: [])
    assert [len(pairs) for pairs in nothing.concept_pairs] == [1], "one that is too long is refused elsewhere"
