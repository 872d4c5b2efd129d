"""The prompts of each group, and what is counted in their images."""

import pytest

from esd_peft.evaluation.prompt_groups import PROMPT_GROUPS, STRONG_GUIDANCE, UNSPECIFIC, group_prompts
from esd_peft.evaluation.rates import Change, Rate, accuracies
from esd_peft.evaluation.suites import Roles, load_suite
from esd_peft.prompts.plan import mentions, retain_prompts
from esd_peft.worlds import WORLDS
from esd_peft.worlds.emoji.vocabulary import STYLES
from esd_peft.worlds.world import SURE, Prompt

FOUND_IN_OTHERS = ("co_occurring", "beside_negative", "recognisable")  # groups without prompts of their own


def groups(world, *concepts, size=24):
    made = {key: [] for key in PROMPT_GROUPS if key not in FOUND_IN_OTHERS}
    for prompt in group_prompts(WORLDS[world], [*concepts], retain_prompts(), size, load_suite(world).samplings):
        made[prompt.group].append(prompt)
    return made


@pytest.mark.parametrize(("world", "concept"), [("emoji", "red apple"), ("emoji", "fox"), ("shapes", "circle")])
def test_prompts_of_what_stays_never_name_the_concept_and_those_of_what_goes_do(world, concept):
    made = groups(world, concept)
    for key in ("training", "paraphrases", "samplers", "styled"):
        assert all(mentions(concept, prompt.text) for prompt in made[key]), key
    for key in ("implicit", "negative_prompt", "neighbours", "shared_word", "unrelated", "retain_set"):
        assert not any(mentions(concept, prompt.text) for prompt in made[key]), key
    texts = [(prompt.text, prompt.sampling) for prompts in made.values() for prompt in prompts]
    assert len(texts) == len({*texts}) and all(len(prompts) <= 24 for prompts in made.values())


def test_a_name_beside_a_style_has_nothing_else_beside_it():
    styled = groups("emoji", "soccer ball")["styled"]
    assert {prompt.labels["style"] for prompt in styled} == {*STYLES}
    assert all({*prompt.labels} == {"thing", "style"} for prompt in styled)


def test_a_negative_prompt_is_the_name_beside_unspecific_prompts_and_neighbours():
    near = {("thing", other) for other in WORLDS["emoji"].neighbours("thing", "fox")}
    negative = groups("emoji", "fox")["negative_prompt"]
    assert len(negative) == 12 and [prompt.text for prompt in negative[: len(UNSPECIFIC)]] == [*UNSPECIFIC]
    assert all(near & {*prompt.labels.items()} for prompt in negative[len(UNSPECIFIC) :])
    assert {(p.sampling.negative_prompt, p.sampling.guidance_scale) for p in negative} == {("fox", STRONG_GUIDANCE)}


@pytest.mark.parametrize(
    ("concept", "sharing"),
    [
        ("red apple", {"green apple"}),
        ("tropical fish", {"tropical drink"}),  # "fish" is on the list
        ("fish", set()),  # "tropical fish" names it
        ("fox", set()),
    ],
)
def test_names_that_share_a_word_with_the_concept(concept, sharing):
    assert {prompt.subject for prompt in groups("emoji", concept)["shared_word"]} == sharing


def test_images_of_one_group_are_counted_in_others():
    """Images of paraphrases for co-occurring attributes and for things, those of negative prompts for what is asked."""
    ink_fox = Prompt("an ink fox", {"thing": "fox", "style": "ink"}, "paraphrases", "fox")
    negative = Prompt("a cat", {"thing": "cat"}, "negative_prompt", "fox")
    roles = Roles({"fox": {"thing": "fox"}}, {"fox": [0]}, [])
    before = [[{"thing": "fox", "style": "ink"} | SURE], [{"thing": "cat"} | SURE]]
    after = [[{"thing": "cat", "style": "ink"}], [{"thing": "fox"} | SURE]]
    found = {key: rates.total for key, rates in accuracies([ink_fox, negative], roles, before, after).groups.items()}
    assert found == {
        "paraphrases": Change(Rate(1, 1), Rate(0, 1)),
        "negative_prompt": Change(Rate(0, 1), Rate(1, 1)),
        "co_occurring": Change(Rate(1, 1), Rate(1, 1)),
        "beside_negative": Change(Rate(1, 1), Rate(0, 1)),
        "recognisable": Change(Rate(1, 1), Rate(0, 1)),
    }
