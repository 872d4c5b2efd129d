"""What the erase command reads off its pictures."""

import torch

from esd_peft import EraseConfig
from esd_peft.evaluation.gallery import Gallery
from esd_peft.models import open_backbone
from esd_peft.worlds.shapes import world


def gallery(**options):
    return Gallery(open_backbone(None), EraseConfig(eval_seeds=0, **options), torch.device("cpu"), torch.float32)


def test_rates_count_what_is_prompted():
    """Rendered pictures of the prompts stand in for generated ones; after, circles are drawn as squares."""
    taken = gallery(concept="circle")
    halves = []
    for circle in (0, 1):
        rows = []
        for prompt in taken.prompts:
            label = [values.index(prompt.labels.get(kind, values[0])) for kind, values in world.ATTRIBUTES.items()]
            rows.append([circle if label[0] == 0 else label[0], *label[1:]])
        halves.append(world.render(torch.tensor(rows), torch.Generator().manual_seed(0)).unsqueeze(1))
    concepts, others = taken.rates(*halves)
    assert concepts["circle"]["before"] >= 0.97 and concepts["circle"]["after"] == 0.0
    assert list(others) == [v for values in world.ATTRIBUTES.values() for v in values if v != "circle"]
    assert all(rate >= 0.97 for rates in others.values() for rate in rates.values())


def test_the_grid_shows_the_concept_and_other_things():
    taken = gallery(concept=["circle", {"name": "striped", "erase_from": "square"}])
    shown = [taken.prompts[i].text for i in taken.shown()]
    assert {"a circle", "a striped square"} <= {*shown} and any("circle" not in text for text in shown)
    assert len(set(shown)) == len(shown) >= 8
