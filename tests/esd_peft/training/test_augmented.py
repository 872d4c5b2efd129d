"""The denoiser as a whole, from many wordings: what a batch asks, what a run leaves, and how it goes on."""

from dataclasses import replace

import pytest
import torch

from esd_kernels import guided_mse_reference
from esd_peft import EraseConfig, UserError, erase
from esd_peft.defaults import resolve
from esd_peft.memory.planner import make_plan
from esd_peft.models import open_family
from esd_peft.models.family import index_embeds
from esd_peft.prompts import wordings as module
from esd_peft.prompts.plan import names
from esd_peft.prompts.wordings import MANY_WORDS, encode_wordings
from esd_peft.runtime import distributed
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.augmented import AugmentedSampler
from esd_peft.training.mixture import HOLD_WEIGHT
from esd_peft.training.names import near
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import make_student
from families import draw_small, save_family
from pipelines import small_stable_diffusion
from runs import CPU, SHORTEST

FEW = replace(module.FEW_PROMPTS, alone=12, near=12, contexts=8, fewest=8, held=8, phrases=16)


@pytest.fixture
def few(monkeypatch):
    """Fewer prompts, so that a moment is enough."""
    for name, value in {"WORDS": 200, "NEAR_WORDS": 4, "FEW_PROMPTS": FEW}.items():
        monkeypatch.setattr(module, name, value)


def make_sampler(model, **options):
    family = open_family(str(model))
    given = EraseConfig(model=str(model), device="cpu", augment_prompts=True, rank=2, **options)
    config, plan = resolve(given, family)
    student = make_student(family, family.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter.normal_(std=0.05)
    wordings = encode_wordings(family, plan, 0, CPU, torch.float32, module.FEW_PROMPTS)
    buffer, draws = config.buffer.replace(num_inference_steps=3), torch.Generator().manual_seed(0)
    return AugmentedSampler(Rollout(student, PhaseProfiler(CPU)), wordings, buffer, config.training, draws)


@pytest.mark.parametrize("options", [{}, {"map_to": "owl", "negative_guidance": 0.3}, {"unprompted_guidance": 2.0}], ids=str)
def test_the_target_is_the_guided_one_for_every_wording(few, options):
    sampler = make_sampler("emoji", concept="fox", **options)
    batch, student, wordings = next(sampler), sampler.rollout.student, sampler.wordings
    texts = {row: text for text, row in wordings.rows.items()}
    rows = [
        next(row for row in texts if torch.equal(wordings.embeds["encoder_hidden_states"][row], given))
        for given in batch.embeds["encoder_hidden_states"]
    ]
    said = [texts[row] for row in rows]
    assert len(batch) == 12 and batch.num_concept_samples == 8
    same = [c.text.removeprefix("a ") for c in sampler.seen.verdicts[0].same]
    assert all(any(names(name, text) for name in ["fox", *same]) for text in said[:8])
    assert not any(names("fox", text) for text in said[8:])

    samples = sampler.seen.samples
    places = [int((samples.inputs == x).flatten(1).all(dim=1).nonzero()[0]) for x in batch.inputs]
    shown = sampler.seen.concept_of(samples.pairs[places]) >= 0
    pairs = {p.prompt: p for group in (*wordings.plain, *wordings.contexts) for p in group}
    pairs |= {p.prompt: p for candidate in sampler.seen.verdicts[0].same for p in candidate.pairs}

    def taught(text, i):
        embeds = index_embeds(wordings.embeds, wordings.index([text]))
        with torch.no_grad(), student.teacher():
            return student.predict(batch.inputs[i : i + 1], batch.timesteps[i : i + 1], embeds)[0]

    eta, pushed = options.get("negative_guidance", 1.0), options.get("unprompted_guidance", 0.0)
    targets = []
    for i, text in enumerate(said):
        if i < 8:
            pair = pairs[text]
            targets.append(taught(pair.goal, i) - eta * (taught(text, i) - taught(pair.neutral, i)))
        elif pushed and shown[i]:
            targets.append(taught(text, i) - pushed * (taught("fox", i) - taught("", i)))
        else:
            targets.append(taught(text, i))
    null, named = samples.teacher[:, samples.pairs < 3]
    weight = torch.tensor([1.0] * 8 + [HOLD_WEIGHT] * 4) / (named - null).square().mean()
    made = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(1))
    expected = (weight * (made - torch.stack(targets)).square().flatten(1).mean(1)).mean()
    loss = guided_mse_reference(made, batch.teacher, batch.eta, batch.anchor, batch.weight)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_it_is_counted_what_the_teacher_is_asked(few, small_sd):
    sampler = make_sampler(small_sd, concept="circle", map_to="star")
    next(sampler)
    before = sampler.rollout.profiler.nfe
    next(sampler)
    assert sampler.rollout.profiler.nfe - before == 3 * 8 + 4


def test_processes_ask_the_teacher_for_their_own_part(few, small_sd, monkeypatch):
    sampler = make_sampler(small_sd, concept="circle")
    next(sampler)
    state = sampler.state_dict()
    whole, parts = next(sampler), []
    for share in (range(5), range(5, 5), range(5, 12)):
        monkeypatch.setattr(distributed, "share", lambda count, share=share: share)
        sampler.generator.set_state(state["generator"])
        parts.append(next(sampler).teacher.unflatten(0, (2, 12))[:, share.start : share.stop])
    torch.testing.assert_close(torch.cat(parts, dim=1).flatten(0, 1), whole.teacher)


def test_samples_lie_within_the_timesteps(few, small_sd):
    sampler = make_sampler(small_sd, concept="circle", min_timestep=500)
    assert min(next(sampler).timesteps.min() for _ in range(3)) >= 500
    sampler = make_sampler(small_sd, concept="circle", min_timestep=2, max_timestep=3)
    with pytest.raises(UserError, match="--min-timestep and --max-timestep leave no step of a trajectory"):
        next(sampler)


@pytest.mark.parametrize("kept", [True, False])
def test_it_goes_on_where_it_stood(few, small_sd, kept):
    """With the trajectories that a checkpoint has, or with the same once more."""
    sampler = make_sampler(small_sd, concept=["circle", "star"])
    for _ in range(2):
        next(sampler)
    state, expected = sampler.state_dict(), next(sampler)
    again = make_sampler(small_sd, concept=["circle", "star"])
    again.load_state_dict(state | ({} if kept else {"buffer": None}))
    batch = next(again)
    for name in ("inputs", "timesteps", "teacher", "eta", "weight"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert near(again.verdicts) == near(sampler.verdicts)


def test_what_is_asked_to_be_kept_is_seen_more_often_than_the_list(few, small_sd):
    sampler = make_sampler(small_sd, concept="circle", preserve="a star")
    next(sampler)
    (held, chances), wordings = sampler.mixture.holding, sampler.wordings
    given = held.prompts == wordings.rows["a star"]
    share = float(chances[given].sum() / chances.sum())
    assert wordings.given == ["a star"] and "a star" not in wordings.listed
    assert 2 / 9 <= share < 0.3, "of what holds, and it may be drawn as a word, too"


def test_interrupted_trajectories_begin_anew(few, small_sd, monkeypatch):
    sampler = make_sampler(small_sd, concept="circle")
    begun = sampler.generator.get_state()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rollout, "collect", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        next(sampler)
    assert torch.equal(sampler.generator.get_state(), begun) and sampler.state_dict() == {"taken": 0, "buffer": None}


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux dev", "pixart", "chroma"])
def test_whole_runs_of_small_models(few, tmp_path, monkeypatch, kind):
    draw_small(monkeypatch)
    path = small_stable_diffusion(tmp_path / "model") if kind == "sd" else save_family(kind, tmp_path / "model")
    given = SHORTEST | {"augment_prompts": True, "max_train_steps": 2, "trajectories": None}
    config = EraseConfig(concept=["circle", "red"], model=str(path), output=tmp_path / "out", **given)
    result = erase(config)
    family = open_family(str(path))
    plan = make_plan(config, *resolve(config, family), family)
    assert 0 < result["nfe"] <= plan.nfe
    assert {*result["other_names"]} == {"circle", "red"} and result["training_samples"] == 16
    assert {"rollout", "train", "save"} <= {*result["seconds"]}


def test_a_tokenizer_that_knows_no_word_cannot_hold_anything(tmp_path):
    model = save_family("z-image", tmp_path / "model")
    config = EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", augment_prompts=True, device="cpu")
    with pytest.raises(UserError, match=r"--augment-prompts needs words .* tokenizer knows none as a whole; leave it out"):
        erase(config)


def test_it_is_the_default_where_cross_attention_cannot_learn_by_itself(monkeypatch):
    emoji = open_family("emoji")
    assert len(emoji.whole_words()) >= MANY_WORDS
    monkeypatch.setattr(type(emoji), "cross_attention", lambda self, denoiser: [])
    emoji = open_family("emoji")
    resolved, prompts = resolve(EraseConfig(concept="fox", device="cpu"), emoji)
    student, training = resolved.student, resolved.training
    assert (training.augment_prompts, student.attention_steps, student.scope, student.rank) == (True, 0, "esd-x-ff", 16)
    assert (student.null_space, student.closed_form) == (0.0, False)
    assert (training.max_train_steps, training.train_batch_size, training.learning_rate) == (160, 12, 3e-3)
    assert resolve(resolved, emoji) == (resolved, prompts)
    others = [{"trajectories": 8}, {"null_space": 0.9}, {"rollout": "student"}, {"robust": 1}, {"scope": "esd-u"}]
    for options in (*others, {"max_train_steps": 0}, {"train_batch_size": 1}, {"preservation_ratio": 0.0}):
        assert not resolve(EraseConfig(concept="fox", device="cpu", **options), emoji)[0].training.augment_prompts
