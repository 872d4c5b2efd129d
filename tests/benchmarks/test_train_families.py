"""The small pipelines of each kind: opened as they are meant to be, and taught what would be right."""

import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("train_families")
    monkeypatch.setattr(module, "POOL", 128)
    monkeypatch.setattr(module, "captions", lambda: ["", "a red circle", "a blue star"])
    monkeypatch.setattr(module.world, "caption", lambda label, generator: "a red circle")
    return module


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart", "z-image"])
def test_what_a_teacher_that_is_right_teaches_is_right(module, kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    module.KINDS[kind]().save_pretrained(tmp_path / kind)
    family = module.opened(tmp_path / kind)
    assert family.image_size(family.empty_denoiser()) == (32, 32)
    lessons = module.Lessons(family, torch.Generator().manual_seed(0), taught=False)
    drawn = lessons.generator.get_state()
    plain = lessons.draw()
    lessons.taught = True
    lessons.generator.set_state(drawn)  # the same latents, noise and captions once more
    schedule, alphas = lessons.teacher.noise_schedule, lessons.teacher.noise_schedule.alphas_cumprod()
    asked = []

    def knows(unet, latents, timesteps, embeds):
        """The noise that is in there, by what the family's own schedule says is right."""
        asked.append(timesteps)
        kept = alphas[timesteps].view(-1, 1, 1, 1)
        x_t, right = (family.unpack_latents(value) for value in (plain[0], plain[2]))
        if not family.noise_schedule.is_flow_matching:
            return right
        sigma = (plain[1] / 1000).view(-1, 1, 1, 1)
        near = (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)  # the same share of signal, to the nearest timestep
        inside = (near <= alphas[0]) & (near >= alphas[-1])
        torch.testing.assert_close(kept[inside], near[inside], atol=2e-2, rtol=0)
        torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0), atol=0.2, rtol=0)
        return x_t + (1 - sigma) * right

    monkeypatch.setattr(lessons.teacher, "predict", knows)
    x_t, timesteps, right, *_ = lessons.draw()
    assert asked and schedule.predicts_noise
    torch.testing.assert_close((x_t, timesteps), plain[:2])
    torch.testing.assert_close(right, plain[2], atol=1e-3, rtol=1e-3)
