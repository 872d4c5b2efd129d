"""Many prompts at few samples: the guided loss of each learner, what it costs, and how it goes on."""

import pytest
import torch

from esd_peft.models.family import index_embeds
from esd_peft.prompts.plan import mentions
from esd_peft.runtime import distributed
from esd_peft.training.learners import PREDICTION
from esd_peft.training.prompt_sampler import PRESERVATION_WEIGHT, PromptSampler
from esd_peft.training.rollout import Rollout
from esd_peft.training.synonyms import neighbours
from esd_peft.training.target import guided_loss
from runs import method_of, prepare, prompt_table

BOTH = pytest.mark.parametrize("method", ["layers", "denoiser"])
STEPS = 3  # of a trajectory


@pytest.fixture(autouse=True)
def quick(few, eager):
    """Few prompts, and the plain loss."""


def made(model, method, **options):
    """The run, whose student has learned something, and its method."""
    given = {"rank": 2, "num_inference_steps": STEPS, "train_batch_size": 12, "preservation_ratio": 0.34}
    run = prepare(model, method=method, **given | options)
    with torch.no_grad():
        for parameter in run.student.parameters:
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
    return run, method_of(run)


@pytest.fixture
def drawn(monkeypatch):
    """The prompts of each batch, as they are drawn."""
    kept, draw = [], PromptSampler.__next__
    monkeypatch.setattr(PromptSampler, "__next__", lambda self: kept.append(draw(self)) or kept[-1])
    return kept


def places_of(batch, collected):
    """Which of the collected samples each of the batch's is."""
    name = next(iter(batch.samples))
    return [int((collected.samples[name] == x).flatten(1).all(dim=1).nonzero()[0]) for x in batch.samples[name]]


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"map_to": "owl", "negative_guidance": 0.3},
        {"concept": ["fox", "rose"], "unprompted_guidance": 2.0, "train_batch_size": 36},
    ],
    ids=str,
)
def test_the_loss_is_the_guided_one_for_every_prompt_and_output(drawn, method, options):
    """Against the formula in fp64, of the teacher's answers to one prompt at a time."""
    concepts = options.get("concept", ["fox"])
    run, ours = made("emoji", method, **{"concept": concepts} | options)
    learner, source, table = ours.learner, ours.source, prompt_table(run)
    batch, ((prompts, neutrals, goals),) = next(source), [(d.prompts, d.neutrals, d.goals) for d in drawn]
    erasing, texts = batch.num_concept_samples, [*table.rows]
    assert len(batch) == options.get("train_batch_size", 12) and 3 * erasing == 2 * len(batch)
    assert all(torch.equal(batch.embeds[name], value[prompts]) for name, value in table.embeds.items())
    known = {(p.prompt, p.neutral, p.anchor_prompt) for group in (*table.plain, *table.contexts) for p in group}
    known |= {(p.prompt, p.neutral, p.anchor_prompt) for m in source.matches for c in m.synonyms for p in c.pairs}
    assert {tuple(texts[row] for row in rows) for rows in zip(prompts, neutrals, goals[:erasing], strict=False)} <= known
    assert not any(mentions(name, texts[row]) for name in concepts for row in prompts[erasing:])

    @torch.no_grad()
    def taught(row, i):
        samples = {name: value[i : i + 1] for name, value in batch.samples.items()}
        with run.student.teacher():
            answer = learner.predict(samples, index_embeds(table.embeds, torch.tensor([int(row)])))
        return {name: output[0].double() for name, output in answer.items()}

    eta, pushed = options.get("negative_guidance", 1.0), options.get("unprompted_guidance", 0.0)
    answers = [[taught(rows[i], i) for rows in (prompts, neutrals, goals)] for i in range(len(batch))]
    shown = source.collected.shown[places_of(batch, source.collected)].tolist()
    if pushed:
        assert min(shown[erasing:]) < 0 <= max(shown[erasing:]), "some are guided away, and some are not"
    with torch.no_grad():
        student = learner.predict(batch.samples, batch.embeds)
    expected = 0.0
    for name, output in student.items():
        targets = []
        for i, (named, null, goal) in enumerate([answer[name] for answer in three] for three in answers):
            if i < erasing:
                targets.append(goal - eta * (named - null))
            elif pushed and shown[i] >= 0:
                away, nothing = (taught(table.rows[text], i)[name] for text in (concepts[shown[i]], ""))
                targets.append(named - pushed * (away - nothing))
            else:
                targets.append(named)
        if method == "layers":  # by what the concepts do in the first batch
            size = torch.stack([named[name] - null[name] for named, null, _ in answers[:erasing]]).square().mean()
        else:  # by what they do along their trajectories
            buffer = source.collected.buffer
            null, named = buffer.teacher[:, source.collected.shown >= 0].double()
            size = (named - null).square().mean()
        weight = torch.tensor([1.0] * erasing + [PRESERVATION_WEIGHT] * (len(batch) - erasing), dtype=torch.float64)
        missed = (output.double() - torch.stack(targets)).square().flatten(1).mean(1)
        expected += (weight * missed).mean() / size / len(student)
    assert guided_loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_other_prompts_are_guided_away_by_the_concept_that_is_drawn():
    """And preserved at samples that show none."""
    _, ours = made("emoji", "denoiser", concept=["fox", "rose"], unprompted_guidance=2.0, train_batch_size=48)
    batch = next(ours.source)
    shown = ours.source.collected.shown[places_of(batch, ours.source.collected)]
    preserved = torch.arange(len(batch)) >= batch.num_concept_samples
    assert {*shown[preserved].tolist()} == {-1, 0, 1}
    assert torch.equal(batch.eta[preserved] == 2.0, shown[preserved] >= 0)


@BOTH
def test_samples_show_the_concept_along_whose_trajectory_they_lie(method):
    """The first half of the probe's trajectories, three of each concept; other prompts drive the rest."""
    _, ours = made("emoji", method, concept=["fox", "rose"])
    next(ours.source)
    collected, calls = ours.source.collected, 2 if method == "layers" else 1  # predictions of a step
    own = 3 * STEPS * calls
    assert collected.shown.add(1).bincount().tolist() == [2 * own, own, own]
    assert all(len(value) == 4 * own for value in collected.samples.values())


@pytest.mark.parametrize(("method", "each"), [("layers", 0), ("denoiser", 1)])
def test_it_is_counted_what_the_teacher_is_asked(small_sd, method, each):
    run, ours = made(small_sd, method, concept="circle", map_to="star")
    next(ours.source)
    before = run.rollout.profiler.nfe
    next(ours.source)
    assert run.rollout.profiler.nfe - before == each * (3 * 8 + 4)


@BOTH
def test_processes_ask_the_teacher_for_their_own_part(small_sd, monkeypatch, method):
    _, ours = made(small_sd, method, concept="circle")
    source = ours.source
    next(source)
    state = source.state_dict()
    whole, parts = next(source).teacher, []
    for share in (range(5), range(5, 5), range(5, 12)):
        monkeypatch.setattr(distributed, "share", lambda count, share=share: share)
        source.draws.set_state(state["generator"])
        teacher = next(source).teacher
        assert teacher.keys() == (whole.keys() if len(share) else set())
        parts.append({name: t.unflatten(0, (2, 12))[:, share.start : share.stop] for name, t in teacher.items()})
    for name, expected in whole.items():
        found = torch.cat([part[name] for part in parts if part], dim=1).flatten(0, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "kept"), [("layers", False), ("denoiser", True), ("denoiser", False)])
def test_it_goes_on_where_it_stood(small_sd, method, kept):
    """With the trajectories that a checkpoint has, or with the same once more."""
    options = {"concept": ["circle", "star"], "map_to": "red"}
    _, ours = made(small_sd, method, **options)
    for _ in range(2):
        next(ours.source)
    state, expected = ours.source.state_dict(), next(ours.source)
    assert (state["buffer"] is None) == (method == "layers")
    later, again = made(small_sd, method, **options)
    later.rollout.profiler.nfe = 7
    again.source.load_state_dict(state | ({} if kept else {"buffer": None}))
    assert later.rollout.profiler.nfe == 7, "what was counted before is not counted again"
    batch = next(again.source)
    for name in ("eta", "weight"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    for name in ("samples", "teacher", "anchor", "embeds", "sizes"):
        one, other = getattr(batch, name), getattr(expected, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert neighbours(again.source.matches) == neighbours(ours.source.matches)


@BOTH
def test_interrupted_trajectories_begin_anew(small_sd, monkeypatch, method):
    source = made(small_sd, method, concept="circle")[1].source
    begun = source.draws.get_state()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rollout, "collect", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        next(source)
    assert torch.equal(source.draws.get_state(), begun) and source.state_dict() == {"taken": 0, "buffer": None}


@BOTH
def test_without_any_learning_what_preserves_costs_nothing(small_sd, method):
    run = prepare(small_sd, method=method, concept="circle", rank=2, num_inference_steps=STEPS)
    ours = method_of(run)
    batch = next(ours.source)
    with torch.no_grad():
        student = ours.learner.predict(batch.samples, batch.embeds)
        batch.weight[: batch.num_concept_samples] = 0
        assert guided_loss(student, batch) < 1e-6
    assert (PREDICTION in student) == (method == "denoiser")
