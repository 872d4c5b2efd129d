"""Rollouts against diffusers' own pipeline and against the DDIM formula written out by hand, for ε and v."""

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

from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.training.learners import PREDICTION
from esd_peft.training.target import guided_loss
from esd_peft.training.trajectory_samples import collate
from families import save_family
from runs import CPU, ETA, GUIDANCE, STEPS, noise, prepare_short

SIZE = {PREDICTION: torch.tensor(1.0)}


def test_trajectories_are_those_of_the_diffusers_pipeline(model):
    ours = prepare_short(model)
    buffer = ours.collect([0, 1], noise())
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
    # the buffer holds the inputs of each step, the pipeline reports the output of each
    for step in range(1, STEPS):
        torch.testing.assert_close(buffer.inputs[2 * step : 2 * step + 2], seen[step - 1], rtol=1e-4, atol=1e-4)
    assert ours.rollout.profiler.nfe == 2 * 2 * STEPS
    assert buffer.pairs.tolist() == [0, 1] * STEPS


@pytest.mark.parametrize(("driver", "scale"), [("teacher", GUIDANCE), ("mixed", -ETA * GUIDANCE)])
def test_steps_and_target_against_the_formula(model, driver, scale, monkeypatch):
    """DDIM with η = 0, and eq. 6 of the paper in ε, whatever the model predicts and wherever the trajectory goes."""
    monkeypatch.setattr("esd_peft.training.rollout.GUIDED", 1.0)
    ours = prepare_short(model, rollout=driver)
    v_prediction = ours.family.load_part("scheduler").config.prediction_type == "v_prediction"
    buffer = ours.collect([0], noise())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def to_epsilon(prediction, x, t):
        return alphas[t].sqrt() * prediction + (1 - alphas[t]).sqrt() * x if v_prediction else prediction

    for i in range(STEPS - 1):
        t, earlier = buffer.timesteps[i].item(), buffer.timesteps[i + 1].item()
        x = buffer.inputs[i].double()
        null, concept = (to_epsilon(e.double(), x, t) for e in buffer.teacher[:, i])
        epsilon = null + scale * (concept - null)
        x0 = (x - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        expected = alphas[earlier].sqrt() * x0 + (1 - alphas[earlier]).sqrt() * epsilon
        torch.testing.assert_close(buffer.inputs[i + 1].double(), expected, rtol=1e-4, atol=1e-4)

        # a student that hits the target in the model's own parameterisation hits eq. 6 in ε
        batch, eta = collate(buffer.index(torch.tensor([i]), CPU), ours.table, SIZE, 1, []), ETA
        own_null, own_concept = buffer.teacher[:, i : i + 1]
        perfect = own_null - eta * (own_concept - own_null)
        assert guided_loss({PREDICTION: perfect}, batch).item() < 1e-10
        torch.testing.assert_close(
            to_epsilon(perfect[0].double(), x, t), null - eta * (concept - null), rtol=1e-4, atol=1e-4
        )


def test_pairs_are_the_teachers_predictions(model):
    ours = prepare_short(model)
    buffer = ours.collect([1], noise(), keep=2)
    assert len(buffer) == 2
    for i in range(2):
        for half, row in ((0, ours.table.neutrals[1]), (1, ours.table.prompts[1])):
            embeds = {k: v[row : row + 1] for k, v in ours.table.embeds.items()}
            with torch.no_grad():
                alone = ours.student.predict(buffer.inputs[i : i + 1], buffer.timesteps[i : i + 1], embeds)
            torch.testing.assert_close(buffer.teacher[half, i], alone[0], rtol=1e-4, atol=1e-4)


def test_student_rollouts_follow_the_student_and_ask_the_teacher(model):
    """The student is a denoiser that errs by a constant; as the teacher it does not."""
    ours = prepare_short(model, rollout="student", scope="esd-u", adapter_type="none")
    with torch.no_grad():
        ours.student.denoiser.conv_out.bias += 0.1
    buffer = ours.collect([0], noise())
    plain = prepare_short(model).collect([0], noise())
    torch.testing.assert_close(buffer.teacher[:, 0], plain.teacher[:, 0])  # the same x_t, the same teacher
    assert (buffer.inputs[-1] - plain.inputs[-1]).abs().max() > 0.05  # but another path


def test_the_guided_target_drives_some_erasing_trajectories(model):
    plain, half = (
        prepare_short(model, rollout=driver, concept=["circle"], preserve=["a square"], rollout_batch_size=4)
        .collect([0, 0, 1, 1], noise())
        .inputs.unflatten(0, (STEPS, 4))
        for driver in ("teacher", "mixed")
    )
    same = [torch.allclose(plain[-1, i], half[-1, i], atol=1e-5) for i in range(4)]
    assert sorted(same[:2]) == [False, True] and same[2:] == [True, True]


def with_scheduler(small_sd, path, kind, **config):
    """A copy of the small pipeline with that scheduler."""
    shutil.copytree(small_sd, path)
    kind(**config).save_pretrained(path / "scheduler")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind.__name__]}))
    return path


def test_edm_timesteps_below_zero_are_steps_like_others(small_sd, tmp_path):
    path = with_scheduler(small_sd, tmp_path / "edm", EDMDPMSolverMultistepScheduler)
    buffer = prepare_short(path).collect([0], noise())
    assert len(buffer) == STEPS and buffer.timesteps.min() < -1 < 1 < buffer.timesteps.max()
    with pytest.raises(UserError, match="noise schedule"):
        prepare_short(path).family.noise_schedule.alphas_cumprod()


def test_continuous_timesteps_are_those_of_their_noise(small_sd, tmp_path):
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    path = with_scheduler(small_sd, tmp_path / "continuous", EulerDiscreteScheduler, **options)
    ours = prepare_short(path)
    buffer = ours.collect([0], noise())
    assert len(buffer) == STEPS and buffer.timesteps.min() < 0
    schedule = ours.family.noise_schedule
    kept = schedule.alphas_cumprod()
    told = schedule.scheduler_timesteps(torch.arange(1000))  # (log σ)/4, σ² being (1 − ᾱ) / ᾱ
    torch.testing.assert_close((8 * told.double()).exp(), (1 - kept.double()) / kept, atol=5e-3, rtol=5e-3)


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
    family = open_family(str(path))
    assert (family.num_inference_steps, family.guidance_scale) == (steps, 1.0 if steps == 4 else 3.0)
