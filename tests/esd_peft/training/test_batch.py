"""A batch, and its parts."""

import pytest
import torch

from esd_peft.training.batch import Batch
from esd_peft.training.target import guided_loss


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_losses_of_the_parts_add_up_to_the_batch(size, anchored):
    """With two outputs of different shapes, and with shares of two processes."""
    shapes = {"a": (4, 3), "b": (2,)}
    batch = Batch(
        {name: draw(5, *shape) for name, shape in shapes.items()},
        {"tokens": draw(5, 7)},
        {name: draw(10, *shape) for name, shape in shapes.items()},
        draw(5),
        draw(5).abs(),
        {name: draw(5, 1, *shape)[:, 0] for name, shape in shapes.items()} if anchored else None,
        {"a": torch.tensor(0.5), "b": torch.tensor(3.0)},
        num_concept_samples=3,
    )
    whole = guided_loss(batch.samples, batch)
    for shares in ([range(5)], [range(2), range(2, 5)], [range(5), range(5, 5)]):
        parts = [part for share in shares for part in batch.split(size, share)]
        assert sum(map(len, parts)) == 5 and max(map(len, parts)) <= size
        assert torch.equal(torch.cat([part.embeds["tokens"] for part in parts]), batch.embeds["tokens"])
        torch.testing.assert_close(sum(guided_loss(part.samples, part) for part in parts), whole)
