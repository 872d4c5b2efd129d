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
    lessons = module.Lessons(family, torch.Generator().manual_seed(0), taught=True)
    drawn = lessons.generator.get_state()
    with monkeypatch.context() as patch:
        patch.setattr(lessons, "_taught", lambda x_t, signal, rest, right, said: right)
        plain = lessons.draw()
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


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_noise_is_drawn_as_often_as_flow_matching_asks_for_it(module, kind, tmp_path):
    module.KINDS[kind]().save_pretrained(tmp_path / kind)
    lessons = module.Lessons(module.opened(tmp_path / kind), torch.Generator().manual_seed(0), taught=True)
    sigmas = torch.linspace(0.02, 0.95, 20)
    signal, rest = lessons.family.noise_schedule.shares(lessons._levels(sigmas))
    torch.testing.assert_close(rest / (signal + rest), sigmas, atol=5e-3, rtol=0)


def test_text_encoders_learn_to_say_what_prompts_name(module, tmp_path, capsys, monkeypatch):
    said = {
        f"a {colour} {shape}": {"colour": colour, "shape": shape}
        for colour in ("red", "blue")
        for shape in ("star", "heart")
    }
    monkeypatch.setattr(module, "captions", lambda: said)
    module.KINDS["z-image"]().save_pretrained(tmp_path / "z-image")
    family = module.opened(tmp_path / "z-image")
    torch.manual_seed(0)
    module.teach_encoder(family, 240, torch.Generator().manual_seed(0))
    assert float(capsys.readouterr().out.split()[-1]) < 0.5
    embeds = family.encode([*said], torch.device("cpu"), torch.float32)
    counts = embeds[module.MASK][..., None].float()
    red_star, red_heart, blue_star, _ = (embeds[module.TOKENS] * counts).sum(1) / counts.sum(1)
    shape, colour = (red_heart - red_star).norm(), (blue_star - red_star).norm()
    assert 0.3 < shape / colour < 3, "all that they name counts alike"
