"""What the erase command reads off its images."""

import torch

from esd_peft.evaluation.image_cache import ImageMemory
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.models import open_family
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.prompts import PromptOptions
from esd_peft.worlds.shapes import world


def sampler(*concepts, seeds=1):
    named = PromptOptions(concept=[*concepts]).concept_names
    with TextEncoder(open_family("shapes"), torch.device("cpu"), torch.float32) as encoder:
        return ValidationSampler(encoder, named, seeds, 12, 0)


def test_rates_count_what_is_prompted():
    """Rendered images of the prompts stand in for generated ones; after, circles are drawn as squares."""
    validation = sampler("circle")
    for label, circle in (("before", 0), ("after", 1)):
        rows = []
        for prompt in validation.evaluator.prompts:
            values = [values.index(prompt.labels.get(kind, values[0])) for kind, values in world.ATTRIBUTES.items()]
            rows.append([circle if values[0] == 0 else values[0], *values[1:]])
        store = validation.stores[label] = ImageMemory()
        for i, pixels in enumerate(world.render(torch.tensor(rows), torch.Generator().manual_seed(0))):
            store.add((i, 0), pixels)
    groups = validation.accuracies().groups
    for key in ("training", "paraphrases"):
        total = groups[key].total
        assert total.before.share >= 0.97 and total.after.share == 0.0 and groups[key].worst == "circle"
    kept = [groups[key] for key in ("neighbours", "unrelated", "retain_set", "co_occurring")]
    assert all(rates.total.before.share >= 0.95 and abs(rates.total.lost) <= 0.05 for rates in kept)
    assert {*groups["neighbours"].changes} <= {*world.SHAPES} and "square" in groups["retain_set"].changes


def test_the_grid_shows_the_concept_and_other_things():
    validation = sampler("circle", {"name": "striped", "erase_from": "square"})
    shown = [validation.evaluator.prompts[i].text for i in validation.grid_prompts()]
    assert "circle" in shown and any("circle" not in text for text in shown)
    assert len(set(shown)) == len(shown) >= 8
