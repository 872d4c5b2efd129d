"""UA, IRA and CRA, counted by hand."""

import pytest

from esd_peft.evaluation.rates import Change, Rate, accuracies
from esd_peft.evaluation.suites import Prompt, Roles

PROMPTS = [
    Prompt("a red circle", {"shape": "circle", "colour": "red"}),
    Prompt("a blue circle", {"shape": "circle", "colour": "blue"}),
    Prompt("a red star", {"shape": "star", "colour": "red"}),
    Prompt("a blue cross", {"shape": "cross", "colour": "blue"}),
]
ROLES = Roles({"circle": {"shape": "circle"}}, {"circle": [0, 1]}, [2, 3])


def seen(*images):
    return [[dict(zip(("shape", "colour"), text.split(), strict=True)) for text in row] for row in images]


def test_each_rate_counts_its_prompts_only():
    before = seen(["circle red"] * 2, ["circle blue"] * 2, ["star red"] * 2, ["cross blue"] * 2)
    after = seen(["star red", "circle red"], ["cross red", "cross blue"], ["star red", "star blue"], ["star blue"] * 2)
    found = accuracies(PROMPTS, ROLES, before, after)
    assert found.targets == {"circle": Change(Rate(4, 4), Rate(1, 4))}
    assert found.others == {
        "shape": {"star": Change(Rate(2, 2), Rate(2, 2)), "cross": Change(Rate(2, 2), Rate(0, 2))},
        "colour": {"red": Change(Rate(2, 2), Rate(1, 2)), "blue": Change(Rate(2, 2), Rate(2, 2))},
    }
    assert found.same_domain == Change(Rate(4, 4), Rate(2, 4))
    assert found.cross_domain == Change(Rate(4, 4), Rate(3, 4))
    assert found.co_occurring == Change(Rate(4, 4), Rate(3, 4))  # of four circles, three are as red or blue as asked
    assert found.others_total == Change(Rate(8, 8), Rate(5, 8))
    assert found.same_domain.lost == 0.5


def test_a_concept_of_two_attributes_needs_both():
    roles = Roles({"red circle": {"shape": "circle", "colour": "red"}}, {"red circle": [0]}, [1, 2, 3])
    before = seen(["circle red"], ["circle blue"], ["star red"], ["cross blue"])
    after = seen(["circle blue"], ["circle blue"], ["star red"], ["cross blue"])
    found = accuracies(PROMPTS, roles, before, after)
    assert found.targets["red circle"].after == Rate(0, 1)
    assert found.cross_domain is None and found.co_occurring is None
    assert found.same_domain.after == Rate(6, 6)


def test_where_nothing_is_seen_or_asked():
    prompts = [Prompt("a dog"), Prompt("a cat", {"object": "cat"})]
    roles = Roles({"dog": {"object": "dog"}}, {"dog": [0]}, [1])
    found = accuracies(prompts, roles, [[{}], [{}]], [[{}], [{"object": "cat"}]])
    assert found.targets["dog"].before == Rate(0, 1)
    assert found.others == {"object": {"cat": Change(Rate(0, 1), Rate(1, 1))}}


def test_rates_have_intervals():
    assert Rate(0, 20).interval == pytest.approx((0, 0.1611), abs=1e-4)
