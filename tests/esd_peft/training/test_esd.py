"""The loss of the guided target, weighted."""

import pytest
import torch

from esd_peft.training.batches import collate
from esd_peft.training.objective import make_objective
from runs import ETA, STEPS, noise, prepare_short


def test_weights_of_concepts_and_timesteps(model):
    ours = prepare_short(model, concept=[{"name": "circle", "weight": 3.0}], snr_gamma=5.0)
    buffer = ours.collect([0], noise())
    batch = collate(buffer, ours.table, STEPS, [])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[buffer.timesteps]
    snr = alphas / (1 - alphas)
    v_prediction = ours.family.load_part("scheduler").config.prediction_type == "v_prediction"
    weight = 3 * snr.clamp(max=5) / (snr + 1 if v_prediction else snr)
    null, concept = buffer.teacher.double()
    expected = (weight * (null - (null - ETA * (concept - null))).square().flatten(1).mean(1)).mean()
    _, loss, _ = make_objective(ours.rollout, ours.table, ours.prompts, ours.config.buffer, ours.config.training)
    assert loss(buffer.teacher[0], batch).item() == pytest.approx(expected.item(), rel=1e-4)
