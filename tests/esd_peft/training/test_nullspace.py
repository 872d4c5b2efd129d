"""What is protected is not touched: the projection, and students that learn under it."""

import pytest
import torch

from esd_peft.config import EraseConfig
from esd_peft.models import open_backbone
from esd_peft.training.nullspace import null_space_projection
from esd_peft.training.student import make_student


def test_the_projection_removes_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(3, 20, generator=generator)
    kept = torch.randn(50, 3, generator=generator) @ spread + 1e-4 * torch.randn(50, 20, generator=generator)
    projection = null_space_projection(kept, 0.999)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-5, rtol=1e-4)
    assert (kept @ projection).norm() < 1e-2 * kept.norm()
    assert round(projection.trace().item()) == 17  # three directions are gone
    other = torch.randn(20, generator=generator)
    assert (other @ projection).norm() > 0.5 * other.norm()


def test_something_is_always_left_to_learn_in():
    assert round(null_space_projection(torch.eye(6), 0.9999).trace().item()) == 1


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_protected_prompts_get_the_same_prediction_after_any_training(small_sd, adapter):
    backbone = open_backbone(str(small_sd))
    denoiser = backbone.load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(0)
    protected, other = torch.randn(2, 1, 16, 24, generator=generator)
    protected[:, 4:] = protected[:, :1]  # few tokens, so that directions are left
    latents = torch.randn(1, 4, 16, 16, generator=generator)

    @torch.no_grad()
    def predict(embeds):
        return backbone.predict(denoiser, latents, torch.tensor([300]), {"encoder_hidden_states": embeds})

    before = predict(protected), predict(other)
    projection = null_space_projection(protected.flatten(0, 1), 0.999999)
    config = EraseConfig(concept="x", adapter=adapter, scope="esd-x-strict")
    student = make_student(backbone, denoiser, config, {"encoder_hidden_states": projection})
    with torch.no_grad():
        for p in student.parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    assert (predict(protected) - before[0]).abs().max() > 1e-3
    student.project()
    torch.testing.assert_close(predict(protected), before[0], atol=2e-5, rtol=1e-4)
    assert (predict(other) - before[1]).abs().max() > 1e-3
