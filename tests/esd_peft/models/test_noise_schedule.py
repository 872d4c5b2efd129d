"""What denoisers are trained on, against their own schedulers."""

import diffusers
import pytest
import torch

from esd_peft.models import open_family
from families import draw_small, save_family
from pipelines import small_stable_diffusion


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion(prediction, tmp_path):
    family = open_family(str(small_stable_diffusion(tmp_path / "sd", prediction_type=prediction)))
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs, timesteps, right = family.noise_schedule.add_noise(latents, noise, torch.tensor([0.0, 0.5, 0.9999]))
    assert timesteps.tolist() == [0, 500, 999]
    scheduler = diffusers.DDPMScheduler.from_config(family.load_part("scheduler").config)
    torch.testing.assert_close(inputs, scheduler.add_noise(latents, noise, timesteps))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(right, expected)


@pytest.mark.parametrize("kind", ["sd3", "flux dev", "sana"])
def test_flows(kind, tmp_path):
    family = open_family(str(save_family(kind, tmp_path / "model")))
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.25, 1.0])
    inputs, timesteps, right = family.noise_schedule.add_noise(latents, noise, levels)
    assert timesteps.tolist() == [250, 1000]
    torch.testing.assert_close(inputs[1], noise[1])
    torch.testing.assert_close(inputs - levels.view(-1, 1, 1, 1) * right, latents)  # straight back along the flow


@pytest.mark.parametrize("kind", ["sd3", "flux dev", "pixart", "sana", "z-image", "flux.2 klein", "qwen-image", "wan"])
def test_images_come_back_from_latents(kind, tmp_path, monkeypatch):
    draw_small(monkeypatch)
    family = open_family(str(save_family(kind, tmp_path / "model")))
    denoiser = family.empty_denoiser()
    size = family.image_size(denoiser)
    cpu, draws = torch.device("cpu"), torch.Generator().manual_seed(0)
    made = family.encode_images(torch.rand(2, 3, *size, generator=draws), draws, cpu)
    assert made.shape == family.initial_latents(2, denoiser, draws).shape
    vae = family.load_part("vae")
    plain = family.vae_latents(vae, made)
    assert vae.decode(plain, return_dict=False)[0].flatten(1, -3).shape == (2, 3, *size)
