"""What a batch holds, and in which order batches come."""

import pytest
import torch

from esd_peft.training.learners import PREDICTION
from esd_peft.training.target import guided_loss
from esd_peft.training.trajectory_samples import TrajectorySamples, collate
from runs import CPU, ETA, STEPS, noise, prepare_short

SIZE = {PREDICTION: torch.tensor(1.0)}


def source(run):
    return TrajectorySamples(run.rollout, run.table, run.config.buffer, run.config.training, noise())


def test_preservation_samples_ask_for_what_must_stay(model):
    ours = prepare_short(model, concept=["circle"], preserve=["a square"], rollout_batch_size=3)
    buffer = ours.collect([0, 0, 1], noise())
    chosen = buffer.index(torch.tensor([0, 1, 4, 2]), CPU)
    assert chosen.pairs.tolist() == [0, 0, 0, 1]
    batch = collate(chosen, ours.table, SIZE, num_concept_samples=2, neutral=[True, False])
    null, concept = chosen.teacher
    target = torch.cat([null[:2] - ETA * (concept - null)[:2], null[2:3], concept[3:]])
    assert guided_loss({PREDICTION: target}, batch).item() < 1e-10
    circle, square, nothing = (ours.table.embeds["encoder_hidden_states"][i] for i in (1, 2, 0))
    torch.testing.assert_close(batch.embeds["encoder_hidden_states"], torch.stack([circle, circle, nothing, square]))


def test_what_does_not_name_the_concept_is_guided_away_from_it_on_its_trajectories(model):
    ours = prepare_short(model, concept=["circle"], preserve=["a square"], rollout_batch_size=3)
    chosen = ours.collect([0, 0, 1], noise()).index(torch.tensor([0, 4, 2]), CPU)
    batch = collate(chosen, ours.table, SIZE, 1, [True, False], unprompted_guidance=3.0)
    null, concept = chosen.teacher
    target = torch.stack([null[0] - ETA * (concept - null)[0], null[1] - 3 * (concept - null)[1], concept[2]])
    assert guided_loss({PREDICTION: target}, batch).item() < 1e-10
    ours = prepare_short(model, concept=["circle"], unprompted_guidance=2.5)
    batch = next(source(ours))
    assert {2.5, ETA} == {*batch.eta.tolist()}


def test_a_mapped_concept_aims_at_its_anchor(model):
    ours = prepare_short(model, concept=[{"name": "circle", "map_to": "square", "negative_guidance": 0.5}, "striped"])
    buffer = ours.collect([0, 1], noise())
    assert ours.rollout.profiler.nfe == 3 * 2 * STEPS
    batch = collate(buffer.index(torch.tensor([0, 1]), CPU), ours.table, SIZE, 2, [])
    null, concept, anchor = buffer.teacher[:, :2]
    torch.testing.assert_close(anchor[1], null[1])
    target = torch.stack([anchor[0] - 0.5 * (concept - null)[0], null[1] - ETA * (concept - null)[1]])
    assert guided_loss({PREDICTION: target}, batch).item() < 1e-10


def test_every_concept_gets_its_share_even_with_one_trajectory_at_a_time(model):
    ours = prepare_short(model, rollout="student", buffer_refresh_interval=1, train_batch_size=1)
    batches = source(ours)
    rows = [ours.table.embeds["encoder_hidden_states"][i] for i in ours.table.prompts[:2]]
    for i in range(4):
        torch.testing.assert_close(next(batches).embeds["encoder_hidden_states"][0], rows[i % 2])


def test_one_preservation_sample_a_buffer_asks_for_both_sides(model):
    """With a buffer for every step, what is held must not be the preserved prompts alone."""
    options = {"rollout": "student", "buffer_refresh_interval": 1, "train_batch_size": 2}
    ours = prepare_short(model, concept=["circle"], preserve=["a square"], **options)
    batches = source(ours)
    assert [next(batches).eta[1].item() for _ in range(4)] == [-1.0, 0.0, -1.0, 0.0]


def test_the_unit_of_the_loss_is_what_the_concepts_do_in_the_first_buffer(model):
    """Preserved prompts do not count, nor what a later buffer holds."""
    ours = prepare_short(model, concept=["circle"], preserve=["a square"], rollout="student", buffer_refresh_interval=1)
    batches = source(ours)
    first = next(batches)
    buffer = batches.buffer
    null, named = buffer.teacher[:, buffer.pairs < ours.table.num_concept_pairs].double()
    assert first.sizes[PREDICTION].item() == pytest.approx((named - null).square().mean().item(), rel=1e-5)
    assert len({*buffer.pairs.tolist()}) == 2
    later = next(batches)
    assert batches.buffer is not buffer and torch.equal(later.sizes[PREDICTION], first.sizes[PREDICTION])
    again = source(ours)
    again.load_state_dict(batches.state_dict())
    assert torch.equal(again.sizes[PREDICTION], first.sizes[PREDICTION])
