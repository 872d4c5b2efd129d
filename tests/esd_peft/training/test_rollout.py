"""Rollouts against diffusers' own pipeline and against the DDIM formula written out by hand, for ε and v."""

import contextlib
import json
import shutil

import pytest
import torch
from diffusers import (
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)

from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.models import open_backbone
from esd_peft.prompts.plan import plan_prompts
from esd_peft.runtime.profiling import Costs
from esd_peft.training.early_stopping import Probe
from esd_peft.training.esd import GuidedTarget, ask
from esd_peft.training.rollout import Rollout, make_table
from families import save_family
from pipelines import small_stable_diffusion

STEPS, GUIDANCE, ETA = 6, 3.0, 1.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)


def rollout(path, **options):
    backbone = open_backbone(str(path))
    denoiser = backbone.load_denoiser(torch.float32)
    defaults = {"concept": ["circle", "striped"], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE,
                "anticipate": 0.0, "eta": ETA, "wordings": "bare", "rollout_batch_size": 2}  # fmt: skip
    config = EraseConfig(**(defaults | options))
    plan = plan_prompts(config)
    table = make_table(plan, backbone.encode(plan.texts, CPU, torch.float32))
    return Rollout(backbone, denoiser, table, contextlib.nullcontext, config, CPU, torch.float32, Costs(CPU))


def noise():
    return torch.Generator().manual_seed(3)


def test_trajectories_are_those_of_the_diffusers_pipeline(model):
    ours = rollout(model)
    bank = ours.fill(torch.tensor([0, 1]), noise(), progress=False)
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    seen = []
    pipe(
        ["circle", "striped"],
        latents=torch.randn(2, 4, 16, 16, generator=noise()),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        callback_on_step_end=lambda _p, _i, _t, kw: seen.append(kw["latents"]) or {},
        output_type="latent",
    )
    # the bank holds the inputs of each step, the pipeline reports the output of each
    for step in range(1, STEPS):
        torch.testing.assert_close(bank.inputs[2 * step : 2 * step + 2], seen[step - 1], rtol=1e-4, atol=1e-4)
    assert ours.costs.forward_equivalents == 2 * 2 * STEPS
    assert bank.pairs.tolist() == [0, 1] * STEPS


@pytest.mark.parametrize(("anticipate", "scale"), [(0.0, GUIDANCE), (1.0, -ETA * GUIDANCE)])
def test_steps_and_target_against_the_formula(model, anticipate, scale):
    """DDIM with η = 0, and eq. 6 of the paper in ε, whatever the model predicts and wherever the trajectory goes."""
    ours = rollout(model, anticipate=anticipate)
    v_prediction = ours.backbone.load_part("scheduler").config.prediction_type == "v_prediction"
    bank = ours.fill(torch.tensor([0]), noise(), progress=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def to_epsilon(prediction, x, t):
        return alphas[t].sqrt() * prediction + (1 - alphas[t]).sqrt() * x if v_prediction else prediction

    for i in range(STEPS - 1):
        t, earlier = bank.timesteps[i].item(), bank.timesteps[i + 1].item()
        x = bank.inputs[i].double()
        null, concept = (to_epsilon(e.double(), x, t) for e in bank.teacher[:, i])
        epsilon = null + scale * (concept - null)
        x0 = (x - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        expected = alphas[earlier].sqrt() * x0 + (1 - alphas[earlier]).sqrt() * epsilon
        torch.testing.assert_close(bank.inputs[i + 1].double(), expected, rtol=1e-4, atol=1e-4)

        # a student that hits the target in the model's own parameterisation hits eq. 6 in ε
        batch, eta = ask(bank.take(torch.tensor([i]), CPU), ours.table, 1, []), ETA
        own_null, own_concept = bank.teacher[:, i : i + 1]
        perfect = own_null - eta * (own_concept - own_null)
        assert GuidedTarget(ours).loss(perfect, batch).item() < 1e-10
        torch.testing.assert_close(
            to_epsilon(perfect[0].double(), x, t), null - eta * (concept - null), rtol=1e-4, atol=1e-4
        )


def test_pairs_are_the_teachers_predictions(model):
    ours = rollout(model)
    bank = ours.fill(torch.tensor([1]), noise(), keep=2, progress=False)
    assert len(bank) == 2
    for i in range(2):
        for half, row in ((0, ours.table.neutrals[1]), (1, ours.table.prompts[1])):
            embeds = {k: v[row : row + 1] for k, v in ours.table.embeds.items()}
            with torch.no_grad():
                alone = ours.backbone.predict(ours.denoiser, bank.inputs[i : i + 1], bank.timesteps[i : i + 1], embeds)
            torch.testing.assert_close(bank.teacher[half, i], alone[0], rtol=1e-4, atol=1e-4)


def test_student_rollouts_follow_the_student_and_ask_the_teacher(model):
    """The student is a denoiser that errs by a constant; only within the teacher's context it does not."""
    ours = rollout(model, rollout="student")
    honest = ours.denoiser.conv_out.bias.data
    astray = honest + 0.1

    @contextlib.contextmanager
    def teacher():
        ours.denoiser.conv_out.bias.data = honest
        yield
        ours.denoiser.conv_out.bias.data = astray

    ours.teacher = teacher
    ours.denoiser.conv_out.bias.data = astray
    bank = ours.fill(torch.tensor([0]), noise(), progress=False)
    plain = rollout(model).fill(torch.tensor([0]), noise(), progress=False)
    torch.testing.assert_close(bank.teacher[:, 0], plain.teacher[:, 0])  # the same x_t, the same teacher
    assert (bank.inputs[-1] - plain.inputs[-1]).abs().max() > 0.05  # but another path


def test_held_samples_ask_for_what_must_stay(model):
    ours = rollout(model, concept=["circle"], preserve=["a square"], rollout_batch_size=3)
    bank = ours.fill(torch.tensor([0, 0, 1]), noise(), progress=False)
    chosen = bank.take(torch.tensor([0, 1, 4, 2]), CPU)
    assert chosen.pairs.tolist() == [0, 0, 0, 1]
    batch = ask(chosen, ours.table, erasing=2, neutral=[True, False])
    null, concept = chosen.teacher
    target = torch.cat([null[:2] - ETA * (concept - null)[:2], null[2:3], concept[3:]])
    assert GuidedTarget(ours).loss(target, batch).item() < 1e-10
    circle, square, nothing = (ours.table.embeds["encoder_hidden_states"][i] for i in (1, 2, 0))
    torch.testing.assert_close(batch.embeds["encoder_hidden_states"], torch.stack([circle, circle, nothing, square]))


def test_a_mapped_concept_aims_at_its_anchor(model):
    ours = rollout(model, concept=[{"name": "circle", "map_to": "square", "eta": 0.5}, "striped"])
    bank = ours.fill(torch.tensor([0, 1]), noise(), progress=False)
    assert ours.costs.forward_equivalents == 3 * 2 * STEPS
    batch = ask(bank.take(torch.tensor([0, 1]), CPU), ours.table, 2, [])
    null, concept, anchor = bank.teacher[:, :2]
    torch.testing.assert_close(anchor[1], null[1])
    target = torch.stack([anchor[0] - 0.5 * (concept - null)[0], null[1] - ETA * (concept - null)[1]])
    assert GuidedTarget(ours).loss(target, batch).item() < 1e-10


def test_weights_of_concepts_and_timesteps(model):
    ours = rollout(model, concept=[{"name": "circle", "weight": 3.0}], snr_gamma=5.0)
    bank = ours.fill(torch.tensor([0]), noise(), progress=False)
    batch = ask(bank, ours.table, STEPS, [])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[bank.timesteps]
    snr = alphas / (1 - alphas)
    v_prediction = ours.backbone.load_part("scheduler").config.prediction_type == "v_prediction"
    weight = 3 * snr.clamp(max=5) / (snr + 1 if v_prediction else snr)
    null, concept = bank.teacher.double()
    expected = (weight * (null - (null - ETA * (concept - null))).square().flatten(1).mean(1)).mean()
    assert GuidedTarget(ours).loss(bank.teacher[0], batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_chosen_timesteps_become_tuples(model):
    ours = rollout(model, min_timestep=400, max_timestep=800)
    everything = rollout(model).fill(torch.tensor([0]), noise(), progress=False)
    bank = ours.fill(torch.tensor([0]), noise(), progress=False)
    inside = (everything.timesteps >= 400) & (everything.timesteps <= 800)
    assert 0 < len(bank) < STEPS
    torch.testing.assert_close(bank.inputs, everything.inputs[inside])
    few = ours.fill(torch.tensor([0, 1]), noise(), keep=1, progress=False)
    assert len(few) == 2 and all(400 <= t <= 800 for t in few.timesteps)


def test_every_concept_gets_its_share_even_with_one_trajectory_a_refill(model):
    ours = rollout(model, rollout="student", refill_every=1, train_batch_size=1)
    supply = GuidedTarget(ours).batches(noise())
    rows = [ours.table.embeds["encoder_hidden_states"][i] for i in ours.table.prompts[:2]]
    for i in range(4):
        torch.testing.assert_close(next(supply).embeds["encoder_hidden_states"][0], rows[i % 2])


def test_some_erasing_trajectories_anticipate(model):
    plain, half = (
        rollout(model, anticipate=a, concept=["circle"], preserve=["a square"], rollout_batch_size=4)
        .fill(torch.tensor([0, 0, 1, 1]), noise(), progress=False)
        .inputs.unflatten(0, (STEPS, 4))
        for a in (0, 0.5)
    )
    same = [torch.allclose(plain[-1, i], half[-1, i], atol=1e-5) for i in range(4)]
    assert sorted(same[:2]) == [False, True] and same[2:] == [True, True]


def test_the_probe_reads_how_much_of_the_direction_is_left(model):
    ours = rollout(model, concept=["circle"], until=0.0)
    probe = Probe(ours, noise())
    assert probe.measure(0) == pytest.approx(1.0, abs=1e-3)  # the student is the teacher yet
    table = ours.table
    table.prompts = table.neutrals  # a student that no longer hears the concept
    assert probe.measure(1) == pytest.approx(0.0, abs=1e-3)
    assert [step for step, _ in probe.curve] == [0, 1]


def test_the_probe_asks_about_every_concept(model):
    names = ["circle", "red", "striped", "star"]
    probe = Probe(rollout(model, concept=names, until=0.0), noise())
    concept_of = {pair: i for i, pairs in enumerate(probe.rollout.table.concepts) for pair in pairs}
    asked = [concept_of[int(pair)] for pair in probe.bank.pairs]
    assert [asked.count(i) for i in range(4)] == [4, 4, 4, 4]


def test_one_held_sample_a_refill_asks_for_both_sides(model):
    """With a bank for every step, what is held must not be the preserved prompts alone."""
    ours = rollout(model, concept=["circle"], preserve=["a square"], rollout="student", refill_every=1, train_batch_size=2)
    supply = GuidedTarget(ours).batches(noise())
    assert [next(supply).eta[1].item() for _ in range(4)] == [-1.0, 0.0, -1.0, 0.0]


def with_scheduler(small_sd, path, kind, **config):
    """A copy of the small pipeline with that scheduler."""
    shutil.copytree(small_sd, path)
    kind(**config).save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind.__name__]}))
    return path


def test_edm_timesteps_below_zero_are_steps_like_others(small_sd, tmp_path):
    path = with_scheduler(small_sd, tmp_path / "edm", EDMDPMSolverMultistepScheduler)
    bank = rollout(path).fill(torch.tensor([0]), noise(), progress=False)
    assert len(bank) == STEPS and bank.timesteps.min() < -1 < 1 < bank.timesteps.max()
    # EDM's steps are even in σ^(1/7) (arXiv 2206.00364, eq. 5), so they divide the timesteps of training evenly
    places = rollout(path).backbone.noise_schedule.training_timesteps(bank.timesteps)
    torch.testing.assert_close(places, torch.linspace(999, 0, STEPS), atol=1.0, rtol=0)
    early = rollout(path, min_timestep=500).fill(torch.tensor([0]), noise(), progress=False)
    assert early.timesteps.tolist() == bank.timesteps[: STEPS // 2].tolist()
    with pytest.raises(UserError, match="noise schedule"):
        rollout(path).backbone.noise_schedule.min_snr_weights(5.0)


def test_continuous_timesteps_have_the_weights_of_their_noise(small_sd, tmp_path):
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    path = with_scheduler(small_sd, tmp_path / "continuous", EulerDiscreteScheduler, **options)
    ours = rollout(path, snr_gamma=5.0)
    bank = ours.fill(torch.tensor([0]), noise(), progress=False)
    assert len(bank) == STEPS and bank.timesteps.min() < 0
    plain = EulerDiscreteScheduler(prediction_type="v_prediction")
    plain.set_timesteps(STEPS)
    torch.testing.assert_close(
        ours.backbone.noise_schedule.training_timesteps(bank.timesteps), plain.timesteps, atol=1.0, rtol=0
    )
    weights = ours.backbone.noise_schedule.at_timesteps(ours.backbone.noise_schedule.min_snr_weights(5.0), bank.timesteps)
    snr = (-8 * bank.timesteps.double()).exp()  # timesteps are (log σ)/4, and SNR is σ^-2
    torch.testing.assert_close(weights.double(), snr.clamp(max=5) / (snr + 1), atol=5e-3, rtol=5e-3)
    every = torch.arange(1000)
    told = ours.backbone.noise_schedule.scheduler_timesteps(every)
    torch.testing.assert_close(ours.backbone.noise_schedule.training_timesteps(told), every.float(), atol=1e-2, rtol=0)


def test_timesteps_between_two_of_training(small_sd):
    backbone = open_backbone(str(small_sd))
    table = backbone.noise_schedule.min_snr_weights(5.0)
    assert torch.equal(backbone.noise_schedule.at_timesteps(table, torch.tensor([0, 7, 999])), table[[0, 7, 999]])
    torch.testing.assert_close(
        backbone.noise_schedule.at_timesteps(table, torch.tensor([900.25])), 0.75 * table[[900]] + 0.25 * table[[901]]
    )


@pytest.mark.parametrize(
    ("kind", "size", "config", "steps"),
    [
        (EulerAncestralDiscreteScheduler, 64, {"timestep_spacing": "trailing"}, 4),  # SDXL-Turbo
        (EulerDiscreteScheduler, 64, {"timestep_spacing": "trailing"}, 4),  # with another of its schedulers
        (EulerAncestralDiscreteScheduler, 128, {"timestep_spacing": "trailing"}, 25),  # SDXL base with Turbo's
        (EulerAncestralDiscreteScheduler, 128, {"timestep_spacing": "leading"}, 25),
        (LCMScheduler, 128, {}, 4),
        (TCDScheduler, 128, {}, 4),
        (EulerAncestralDiscreteScheduler, 64, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, 25),
        (EulerDiscreteScheduler, 64, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 25),
    ],
)
def test_few_step_models_are_known_by_what_they_are(tmp_path, kind, size, config, steps):
    save_family("sdxl", tmp_path / "base")
    path = with_scheduler(tmp_path / "base", tmp_path / "model", kind, **config)
    unet = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps(unet | {"sample_size": size}))
    backbone = open_backbone(str(path))
    assert (backbone.num_inference_steps, backbone.guidance_scale) == (steps, 1.0 if steps == 4 else 3.0)
