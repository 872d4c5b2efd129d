"""Learners: what they predict, and which samples they are given."""

import pytest
import torch

from esd_peft.training.learners import PREDICTION, CrossAttention, Denoiser, HiddenStates, pairs_of_samples
from esd_peft.training.synonyms import probe_teacher
from runs import CPU, prepare, prompt_table


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learning(learner):
    """The learner, which has learned something."""
    with torch.no_grad():
        for parameter in learner.student.parameters:
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    return learner


@torch.no_grad()
def test_cross_attention_predicts_what_each_block_adds(small_sd):
    """By diffusers' block itself, whose self-attention adds nothing."""
    run = prepare(small_sd, concept="circle", scope="esd-x-ff", rank=2)
    learner = learning(CrossAttention(run.student))
    names = run.family.cross_attention(run.student.denoiser)
    assert [*learner.layers] == names and names
    embeds = {"encoder_hidden_states": draw(3, 16, 24)}
    samples = {name: draw(3, 8, layer.width, seed=2) for name, layer in learner.layers.items()}
    made = learner.predict(samples, embeds)
    for name in names:
        block = run.student.denoiser.get_submodule(name)
        block.attn1.to_out[0].weight.zero_()
        block.attn1.to_out[0].bias.zero_()
        added = block(samples[name], encoder_hidden_states=embeds["encoder_hidden_states"]) - samples[name]
        torch.testing.assert_close(made[name], added, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("learner", [CrossAttention, Denoiser])
def test_the_teacher_is_the_same_learner_without_what_was_learned(small_sd, learner):
    run = prepare(small_sd, concept="circle", scope="esd-x-ff", rank=2)
    ours = learner(run.student)
    if learner is Denoiser:
        samples = {"inputs": draw(2, 4, 16, 16), "timesteps": torch.tensor([300, 700])}
    else:
        samples = {name: draw(2, 8, layer.width) for name, layer in ours.layers.items()}
    embeds = {"encoder_hidden_states": draw(2, 16, 24)}
    before, after = ours.predict(samples, embeds), learning(ours).predict(samples, embeds)
    with run.student.teacher():
        taught = ours.predict(samples, embeds)
    assert before.keys() == after.keys() == taught.keys() and (learner is CrossAttention or [*after] == [PREDICTION])
    for name in before:
        assert torch.equal(before[name], taught[name]) and not torch.allclose(before[name], after[name], atol=1e-4)


@pytest.mark.parametrize(("scope", "parts"), [("esd-x-ff", {"attn2", "ff"}), ("esd-x-strict", {"attn2"}), ("full", None)])
def test_only_cross_attention_and_what_follows_it_learns(small_sd, scope, parts):
    run = prepare(small_sd, concept="circle", scope=scope, rank=2)
    learns = {id(p) for p in CrossAttention(run.student).parameters}
    found = {name for name, p in run.student.denoiser.named_parameters() if id(p) in learns}
    known = {part for name in found for part in ("attn1", "attn2", "ff") if part in name.split(".")}
    assert known == (parts or {"attn2", "ff"}) and len(found) == len(learns)


@pytest.mark.parametrize(("options", "predictions"), [({}, 2), ({"map_to": "owl"}, 3)], ids=str)
def test_it_is_known_which_concept_a_sample_shows(few, options, predictions):
    run = prepare("emoji", concept=["fox", "rose"], method="layers", rank=2, rollout_batch_size=4, **options)
    layers = CrossAttention(run.student).layers
    block = next(iter(layers))
    states = HiddenStates({block: layers[block]}, CPU)
    buffer = run.config.buffer.replace(num_inference_steps=2)
    seen = probe_teacher(run.rollout, prompt_table(run), buffer, torch.Generator().manual_seed(0), states.watch)
    assert seen.own == 6 and len(states.parts) == 2, "the concepts' trajectories, then the others"
    given = states.parts[0][block].flatten(1)
    pairs = pairs_of_samples(torch.arange(6), 4, len(given))
    assert pairs.bincount().tolist() == [2 * predictions] * 6
    assert seen.samples.pairs.bincount().tolist() == [2] * 12, "two steps"
    assert seen.concept_of(torch.arange(12)).tolist() == [0] * 3 + [1] * 3 + [-1] * 6
    # nothing has read the prompt before the first block: there all predictions of a pair are given the same
    twins = torch.cdist(given, given).fill_diagonal_(torch.inf).min(dim=1)
    assert twins.values.max() < 1e-3 * given.norm(dim=1).mean()
    assert torch.equal(pairs[twins.indices], pairs)
