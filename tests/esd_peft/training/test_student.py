"""Scopes at real size, and students that are their own teachers."""

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

from esd_peft.models import FAMILIES, open_family
from esd_peft.models.scopes import joint_attention
from esd_peft.options.model import SCOPES
from esd_peft.options.training import StudentOptions
from esd_peft.training.student import make_student
from families import MAKERS, save_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


@pytest.mark.parametrize(
    ("scope", "millions"), [("esd-x", 44.0), ("esd-x-strict", 19.2), ("esd-x-ff", 192.8), ("esd-u", 815), ("full", 860)]
)
def test_scope_sizes_of_stable_diffusion_1(sd15, scope, millions):
    parameters = dict(sd15.named_parameters())
    names = open_family("shapes").scope_parameters(sd15, scope)
    assert sum(parameters[n].numel() for n in names) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(("scope", "millions"), [("esd-x", 546), ("esd-x-strict", 341), ("esd-x-ff", 1775), ("full", 2567)])
def test_scope_sizes_of_stable_diffusion_xl(scope, millions):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    parameters = dict(unet.named_parameters())
    names = open_family("shapes").scope_parameters(unet, scope)
    assert sum(parameters[n].numel() for n in names) / 1e6 == pytest.approx(millions, rel=2e-3)


MODULES = {"z-image": "z_image", "flux.2": "flux_2", "qwen-image": "qwen_image"}
TRANSFORMERS = {  # at their true sizes, and millions of parameters in esd-x-strict, esd-x, esd-x-ff and full
    "chroma": (ChromaTransformer2DModel, {}, (12.59, 730.1, 2164.8, 8900.0)),
    "flux.2 klein": (
        Flux2Transformer2DModel,
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        (23.59, 212.3, 637.0, 3875.5),
    ),
    "flux.2 dev": (Flux2Transformer2DModel, {}, (94.37, 1302.3, 4020.2, 32223.3)),
    "qwen-image": (QwenImageTransformer2DModel, {}, (11.01, 2276.7, 6807.4, 20430.4)),
    "wan": (
        WanTransformer3DModel,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        (141.65, 283.4, 1109.5, 1419.0),
    ),
    "z-image": (ZImageTransformer2DModel, {}, (9.84, 127.8, 363.7, 6154.9)),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_scope_sizes_of_transformers(name):
    kind, sizes, millions = TRANSFORMERS[name]
    with torch.device("meta"):
        denoiser = kind(**sizes)
    family = next(family for family in FAMILIES if family.__module__.endswith(MODULES.get(name.split()[0], name)))
    for scope, expected in zip(("esd-x-strict", "esd-x", "esd-x-ff", "full"), millions, strict=True):
        chosen = [p.numel() for n, p in denoiser.named_parameters() if family.in_scope(None, scope, n)]
        assert sum(chosen) / 1e6 == pytest.approx(expected, rel=2e-3)


def test_scopes_of_joint_attention():
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    names = [name for name, module in flux.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = {scope: {n for n in names if joint_attention(scope, n)} for scope in SCOPES}
    assert chosen["esd-x-strict"] == {"context_embedder", "time_text_embed.text_embedder.linear_1"}
    block = "transformer_blocks.1.attn."
    assert chosen["esd-x"] - chosen["esd-x-strict"] >= {
        block + n for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    assert {block + "to_k", "single_transformer_blocks.0.attn.to_v"} < chosen["selfattn"] < chosen["esd-u"]
    fed = chosen["esd-x-ff"] - chosen["esd-x"]
    assert len(fed) == 4 and all("ff_context" in name for name in fed), "the text's, of which single blocks have none"
    assert chosen["esd-x"] | chosen["esd-u"] == chosen["full"] == set(names)
    assert not chosen["esd-x"] & chosen["esd-u"]


def test_scopes_select_what_they_say(sd15):
    family = open_family("shapes")
    chosen = {s: set(family.scope_modules(sd15, s)) for s in SCOPES}
    assert chosen["esd-x-strict"] < chosen["esd-x"] < chosen["esd-x-ff"] < chosen["full"]
    assert len(chosen["esd-x-ff"] - chosen["esd-x"]) == 32 and not chosen["esd-x-ff"] & chosen["selfattn"]
    assert chosen["selfattn"] < chosen["esd-u"]
    assert chosen["esd-x"] | chosen["esd-u"] == chosen["full"]
    assert not chosen["esd-x"] & chosen["esd-u"]
    assert len(chosen["esd-x-strict"]) == 32 and len(chosen["esd-x"]) == 64  # 16 blocks of k, v (and q, out)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_strict_scope_has_the_same_layers_for_weights_and_adapters(kind, tmp_path):
    family = open_family(str(save_family(kind, tmp_path / "model")))
    denoiser = family.empty_denoiser()
    weights = {name.rpartition(".")[0] for name in family.scope_parameters(denoiser, "esd-x-strict")}
    assert weights == {*family.scope_modules(denoiser, "esd-x-strict")}, "linear in the prompt's tokens: no norm among them"


@pytest.mark.parametrize("adapter_type", ["lora", "loha", "lokr", "none"])
def test_a_student_is_its_own_teacher(small_sd, adapter_type):
    family = open_family(str(small_sd))
    denoiser = family.load_denoiser(torch.float32)
    embeds = {"encoder_hidden_states": torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))}
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def predict():
        return family.predict(denoiser, latents, torch.tensor([300]), embeds)

    base = predict()
    rank = None if adapter_type == "none" else 2
    options = StudentOptions(scope="esd-x-strict", adapter_type=adapter_type, rank=rank, alpha=rank)
    student = make_student(family, denoiser, options, CPU, torch.float32)
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


@pytest.mark.parametrize("adapter_type", ["lora", "loha", "lokr", "none"])
def test_a_student_at_some_strength_has_so_much_of_its_change(small_sd, adapter_type):
    family = open_family(str(small_sd))
    denoiser = family.load_denoiser(torch.float32)
    layer = family.scope_modules(denoiser, "esd-x-strict")[0]
    rank = None if adapter_type == "none" else 2
    options = StudentOptions(scope="esd-x-strict", adapter_type=adapter_type, rank=rank, alpha=rank)
    student = make_student(family, denoiser, options, CPU, torch.float32)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def output():
        return denoiser.get_submodule(layer)(x)

    with torch.no_grad():
        for p in student.parameters:
            p += 0.1
    with student.teacher():
        base = output()
    full = output()
    assert (full - base).abs().max() > 1e-2
    for strength in (0.0, 0.5, 1.0, 1.5):
        with student.scaled(strength):
            torch.testing.assert_close(output() - base, strength * (full - base), rtol=1e-4, atol=1e-5)
    assert torch.equal(output(), full)
    assert all(p.requires_grad for p in student.parameters)


@pytest.mark.parametrize(("adapter_type", "enabled"), [("lora", False), ("lokr", False), ("none", True)])
def test_autocast_only_where_the_weights_themselves_learn(small_sd, adapter_type, enabled):
    family, rank = open_family(str(small_sd)), None if adapter_type == "none" else 2
    options = StudentOptions(scope="esd-u", adapter_type=adapter_type, rank=rank, alpha=rank)
    for dtype in (torch.bfloat16, torch.float32):
        student = make_student(family, family.load_denoiser(torch.float32), options, CPU, dtype)
        with student.autocast():
            assert torch.is_autocast_enabled("cpu") == (enabled and dtype == torch.bfloat16)


@pytest.mark.parametrize("scope", ["full", "esd-u"])
@pytest.mark.parametrize("adapter_type", ["lora", "loha", "lokr"])
def test_depthwise_convolutions_are_left_out(tmp_path, scope, adapter_type):
    family = open_family(str(save_family("sana", tmp_path / "sana")))
    denoiser = family.load_denoiser(torch.float32)
    depthwise = {n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1}
    chosen = set(family.scope_modules(denoiser, scope))
    assert depthwise and not depthwise & chosen
    assert {name.replace("conv_depth", "conv_inverted") for name in depthwise} <= chosen
    options = StudentOptions(scope=scope, adapter_type=adapter_type, rank=3, alpha=3)
    make_student(family, denoiser, options, CPU, torch.float32)
    assert {name.split(".base_layer")[0] for name, _ in denoiser.named_parameters() if "base_layer" in name} == chosen
