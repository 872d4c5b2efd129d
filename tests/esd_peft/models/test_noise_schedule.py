"""What denoisers are trained on, against their own schedulers."""

import diffusers
import pytest
import torch

from esd_peft.models import open_backbone
from families import save_family
from pipelines import small_stable_diffusion


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion(prediction, tmp_path):
    backbone = open_backbone(str(small_stable_diffusion(tmp_path / "sd", prediction_type=prediction)))
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs, timesteps, right = backbone.noise_schedule.add_noise(latents, noise, torch.tensor([0.0, 0.5, 0.9999]))
    assert timesteps.tolist() == [0, 500, 999]
    scheduler = diffusers.DDPMScheduler.from_config(backbone.load_part("scheduler").config)
    torch.testing.assert_close(inputs, scheduler.add_noise(latents, noise, timesteps))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(right, expected)


@pytest.mark.parametrize("family", ["sd3", "flux dev", "sana"])
def test_flows(family, tmp_path):
    backbone = open_backbone(str(save_family(family, tmp_path / "model")))
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.25, 1.0])
    inputs, timesteps, right = backbone.noise_schedule.add_noise(latents, noise, levels)
    assert timesteps.tolist() == [250, 1000]
    torch.testing.assert_close(inputs[1], noise[1])
    torch.testing.assert_close(inputs - levels.view(-1, 1, 1, 1) * right, latents)  # straight back along the flow


@pytest.mark.parametrize("family", ["sd3", "flux dev", "pixart", "sana"])
def test_pictures_come_back_from_latents(family, tmp_path, monkeypatch):
    monkeypatch.setattr("esd_peft.models.flux.LATENT_SIZE", (16, 16))
    backbone = open_backbone(str(save_family(family, tmp_path / "model")))
    denoiser = backbone.empty_denoiser()
    size = backbone.picture_size(denoiser)
    cpu, draws = torch.device("cpu"), torch.Generator().manual_seed(0)
    made = backbone.encode_pictures(torch.rand(2, 3, *size, generator=draws), draws, cpu)
    assert made.shape == backbone.initial_latents(2, denoiser, draws).shape
    vae = backbone.load_part("vae")
    plain = backbone.vae_latents(made) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
    assert vae.decode(plain, return_dict=False)[0].shape == (2, 3, *size)
