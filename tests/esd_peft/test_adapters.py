"""Scopes at real size, and students that are their own teachers."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_peft.adapters import make_student, scope_modules, scope_parameters
from esd_peft.backbones import open_backbone
from esd_peft.config import EraseConfig


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@pytest.mark.parametrize(("scope", "millions"), [("esd-x", 44.0), ("esd-x-strict", 19.2), ("esd-u", 815), ("full", 860)])
def test_scope_sizes_of_stable_diffusion_1(sd15, scope, millions):
    parameters = dict(sd15.named_parameters())
    names = scope_parameters(open_backbone(None), sd15, scope)
    assert sum(parameters[n].numel() for n in names) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_scopes_select_what_they_say(sd15):
    chosen = {
        s: set(scope_modules(open_backbone(None), sd15, s)) for s in ("esd-x", "esd-x-strict", "esd-u", "selfattn", "full")
    }
    assert chosen["esd-x-strict"] < chosen["esd-x"] < chosen["full"]
    assert chosen["selfattn"] < chosen["esd-u"]
    assert chosen["esd-x"] | chosen["esd-u"] == chosen["full"]
    assert not chosen["esd-x"] & chosen["esd-u"]
    assert len(chosen["esd-x-strict"]) == 32 and len(chosen["esd-x"]) == 64  # 16 blocks of k, v (and q, out)


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr", "none"])
def test_a_student_is_its_own_teacher(small_sd, adapter):
    backbone = open_backbone(str(small_sd))
    denoiser = backbone.load_denoiser(torch.float32)
    embeds = {"encoder_hidden_states": torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def predict():
        return backbone.predict(denoiser, latents, torch.tensor([300]), embeds)

    base = predict()
    student = make_student(backbone, denoiser, EraseConfig(concept="x", adapter=adapter, rank=2))
    assert torch.equal(predict(), base), "an untrained adapter changes nothing"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters)
    with torch.no_grad():
        for p in student.parameters:
            p += 0.1
    assert (predict() - base).abs().max() > 1e-3
    with student.teacher():
        assert torch.equal(predict(), base)
    assert (predict() - base).abs().max() > 1e-3
    assert all(p.requires_grad for p in student.parameters)
