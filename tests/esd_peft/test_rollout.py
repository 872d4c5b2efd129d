"""Rollouts against diffusers' own pipeline and against the DDIM formula written out by hand, for ε and v."""

import contextlib

import pytest
import torch
from diffusers import StableDiffusionPipeline

from esd_peft.backbones import open_backbone
from esd_peft.config import EraseConfig
from esd_peft.distill import batches
from esd_peft.objectives import esd_loss, esd_task
from esd_peft.phases import Costs
from esd_peft.rollout import Rollout
from pipelines import small_stable_diffusion

STEPS, GUIDANCE, ETA = 6, 3.0, 1.5
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request, tmp_path_factory):
    return small_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)


def rollout(path, **options):
    backbone = open_backbone(str(path))
    denoiser = backbone.load_denoiser(torch.float32)
    embeds = backbone.encode(["", "circle", "striped"], CPU, torch.float32)
    defaults = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "anticipate": 0.0, "eta": ETA}
    config = EraseConfig(concept=["circle", "striped"], rollout_batch_size=2, **(defaults | options))
    return Rollout(backbone, denoiser, embeds, contextlib.nullcontext, config, CPU, torch.float32, Costs(CPU))


def noise():
    return torch.Generator().manual_seed(3)


def test_trajectories_are_those_of_the_diffusers_pipeline(model):
    ours = rollout(model)
    bank = ours.fill(torch.tensor([1, 2]), noise(), progress=False)
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
    assert bank.prompts.tolist() == [1, 2] * STEPS


@pytest.mark.parametrize(("anticipate", "scale"), [(0.0, GUIDANCE), (1.0, -ETA * GUIDANCE)])
def test_steps_and_target_against_the_formula(model, anticipate, scale):
    """DDIM with η = 0, and eq. 6 of the paper in ε, whatever the model predicts and wherever the trajectory goes."""
    ours = rollout(model, anticipate=anticipate)
    v_prediction = ours.backbone.new_scheduler(STEPS, CPU).config.prediction_type == "v_prediction"
    bank = ours.fill(torch.tensor([1]), noise(), progress=False)
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
        batch, eta = bank.take(torch.tensor([i]), CPU), ETA
        own_null, own_concept = bank.teacher[:, i : i + 1]
        perfect = own_null - eta * (own_concept - own_null)
        assert esd_loss(perfect, batch, esd_task(batch, eta, 0)).item() < 1e-10
        torch.testing.assert_close(
            to_epsilon(perfect[0].double(), x, t), null - eta * (concept - null), rtol=1e-4, atol=1e-4
        )


def test_pairs_are_the_teachers_predictions(model):
    ours = rollout(model)
    bank = ours.fill(torch.tensor([2]), noise(), keep=2, progress=False)
    assert len(bank) == 2
    for i in range(2):
        for half, row in ((0, 0), (1, 2)):
            embeds = {k: v[row : row + 1] for k, v in ours.embeds.items()}
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
    bank = ours.fill(torch.tensor([1]), noise(), progress=False)
    plain = rollout(model).fill(torch.tensor([1]), noise(), progress=False)
    torch.testing.assert_close(bank.teacher[:, 0], plain.teacher[:, 0])  # the same x_t, the same teacher
    assert (bank.inputs[-1] - plain.inputs[-1]).abs().max() > 0.05  # but another path


def test_held_samples_ask_for_the_null_prediction(model):
    bank = rollout(model).fill(torch.tensor([1]), noise(), progress=False)
    task = esd_task(bank, 2.0, held=2)
    assert task.prompts.tolist() == [1] * (STEPS - 2) + [0, 0]
    assert task.eta.tolist() == [2.0] * (STEPS - 2) + [0.0, 0.0]
    target = bank.teacher[0] - task.eta.reshape(-1, 1, 1, 1) * (bank.teacher[1] - bank.teacher[0])
    assert esd_loss(target, bank, task).item() < 1e-10
    torch.testing.assert_close(target[-2:], bank.teacher[0, -2:])


def test_every_concept_gets_its_share_even_with_one_trajectory_a_refill(model):
    ours = rollout(model, rollout="student", refill_every=1, train_batch_size=1)
    supply = batches(ours, noise())
    assert [next(supply).prompts.item() for _ in range(4)] == [1, 2, 1, 2]


def test_anticipating_trajectories_are_shared_out_over_small_batches(model):
    plain, half = (rollout(model, anticipate=a).fill(torch.tensor([1, 2, 1, 2]), noise(), progress=False) for a in (0, 0.5))
    # two batches of two: the first one anticipates
    same = [torch.equal(plain.inputs[i : i + 2], half.inputs[i : i + 2]) for i in range(0, len(plain), 2)]
    assert same == [True] + [False] * (STEPS - 1) + [True] * STEPS
