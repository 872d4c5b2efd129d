"""What other tools read: each file is read back by diffusers' own loaders and converters."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from diffusers.loaders import single_file_utils as diffusers_names
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from huggingface_hub import constants
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.adapters.export import KOHYA_FILE, limits, write_checkpoint, write_kohya_lora
from esd_peft.adapters.ldm_keys import clip_sources, unet_name, vae_name
from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.models.wan import _original_name
from esd_peft.options.model import ModelOptions
from esd_peft.options.training import StudentOptions
from esd_peft.training.student import make_student
from families import draw_small, save_family
from pipelines import small_stable_diffusion

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 2, "trajectories": 2, "max_train_steps": 3, "rank": 2, "device": "cpu",
         "num_validation_images": 0, "learning_rate": 0.1}  # fmt: skip
SDXL = {
    "block_out_channels": (320, 640, 1280), "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
       "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2}  # fmt: skip


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def predict(unet, width=24):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([17, 800]), torch.randn(2, 16, width, generator=generator)).sample


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """A small pipeline whose text encoder is an OpenCLIP, as in Stable Diffusion 2; v-prediction."""
    path = small_stable_diffusion(tmp_path_factory.mktemp("models") / "sd2", prediction_type="v_prediction")
    config = CLIPTextConfig.from_pretrained(path / "text_encoder")
    config.hidden_act = "gelu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPTextModel(config).save_pretrained(path / "text_encoder")
    return path


@pytest.fixture(scope="module")
def sdxl(small_sd, tmp_path_factory):
    """A small Stable Diffusion XL directory: the parts of the small 1.x one, a UNet that takes two encoders' words."""
    sd = StableDiffusionPipeline.from_pretrained(small_sd, dtype=torch.float32)
    config = sd.text_encoder.config.to_dict() | {"hidden_size": 16, "projection_dim": 16, "hidden_act": "gelu"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=2, attention_head_dim=4, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), cross_attention_dim=40, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        )  # fmt: skip
        second = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    parts = {"vae": sd.vae, "text_encoder": sd.text_encoder, "tokenizer": sd.tokenizer, "scheduler": sd.scheduler}
    pipe = StableDiffusionXLPipeline(**parts, unet=unet, text_encoder_2=second, tokenizer_2=sd.tokenizer)
    path = tmp_path_factory.mktemp("models") / "sdxl"
    pipe.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_unet_names_are_what_diffusers_converter_takes(kind):
    """At real size: the converter finds every weight, under the name and with the shape it has."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(SDXL if kind == "sdxl" else {"cross_attention_dim": 768}))
    weights = unet.state_dict()
    renamed = {f"model.diffusion_model.{unet_name(name, unet.config)}": value for name, value in weights.items()}
    found = diffusers_names.convert_ldm_unet_checkpoint(renamed, unet.config)
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in weights.items()}
    assert all(found[name] is weights[name] for name in weights)


def test_vae_names_are_what_diffusers_converter_takes():
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    weights = vae.state_dict()
    renamed = {f"first_stage_model.{vae_name(name, vae.config)}": value for name, value in weights.items()}
    found = diffusers_names.convert_ldm_vae_checkpoint(renamed, vae.config)
    assert found.keys() == weights.keys() and all(found[name] is weights[name] for name in weights)
    old = "decoder.mid_block.attentions.0."
    assert vae_name(f"{old}proj_attn.bias", vae.config) == vae_name(f"{old}to_out.0.bias", vae.config)


def test_open_clip_names_are_what_diffusers_converter_takes():
    config = CLIPTextConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
                            projection_dim=16, hidden_act="gelu")  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    weights = model.state_dict()
    prefix = "conditioner.embedders.1."
    joined = {}
    for new, old in clip_sources(weights, config.to_dict()).items():
        value = torch.cat([weights[name] for name in old]) if len(old) > 1 else weights[old[0]]
        joined[prefix + new] = value.T if new.endswith("text_projection") else value
    found = diffusers_names.convert_open_clip_checkpoint(model, joined, prefix=f"{prefix}model.")
    kept = {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    assert found.keys() == kept.keys() and all(torch.equal(found[name], value) for name, value in kept.items())


@pytest.mark.parametrize("which", ["small_sd", "sd2", "sdxl"])
def test_a_checkpoint_holds_every_weight_of_the_pipeline(which, request, tmp_path, monkeypatch):
    model = request.getfixturevalue(which)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    write_checkpoint(tmp_path / "sd.safetensors", open_family(str(model)), lambda name, weight: weight, {})
    options = ModelOptions(checkpoint_config=str(model))
    again = open_family(str(tmp_path / "sd.safetensors"), options=options)
    assert again.name == "sd"
    files = [*model.glob("*/*.safetensors")]
    assert len(files) == (4 if which == "sdxl" else 3)
    for file in files:
        was, found = load_file(file), load_file(again.path / file.relative_to(model))
        if file.parent.name == "text_encoder":  # which is written for every version of transformers
            was = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in was.items()}
        assert was.keys() == found.keys()
        assert all(torch.equal(was[name], found[name]) and was[name].dtype == found[name].dtype for name in was)
    assert open_family(str(tmp_path / "sd.safetensors"), options=options).path == again.path, "converted once"


def test_a_checkpoint_trains_and_merges_like_its_directory(small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    file = tmp_path / "sd.safetensors"
    write_checkpoint(file, open_family(str(small_sd)), lambda name, weight: weight, {})
    adapters = tmp_path / "from_directory", tmp_path / "from_file"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=adapters[0], **QUICK))
    erase(EraseConfig(concept="circle", model=str(file), checkpoint_config=str(small_sd), output=adapters[1], **QUICK))
    first, second = (load_file(path / "adapter_model.safetensors") for path in adapters)
    assert all(torch.equal(first[name], second[name]) for name in first)

    record = merge_adapter(MergeConfig(adapter=adapters[1], output=tmp_path / "merged.safetensors"))
    assert record["base"]["trained_on_it"] and record["verification"]["adapter_changes"] > 0.01
    merge_adapter(MergeConfig(adapter=adapters[0], output=tmp_path / "merged"))
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "merged.safetensors", config=str(small_sd), safety_checker=None
    )
    expected = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.unet.state_dict().items())
    said = metadata_of(tmp_path / "merged.safetensors")
    assert said["modelspec.architecture"] == "stable-diffusion-v1" and said["modelspec.title"] == "merged"
    assert json.loads(said["esd_peft.concept"]) == ["circle"] and json.loads(said["esd_peft.scope"]) == ["esd-x-strict"]
    with pytest.raises(UserError, match=r"merged.safetensors is already there"):
        merge_adapter(MergeConfig(adapter=adapters[1], output=tmp_path / "merged.safetensors"))


EDM = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}


@pytest.mark.parametrize(
    ("scheduler", "markers"),
    [
        ({}, []),
        ({"prediction_type": "v_prediction"}, ["v_pred"]),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ["v_pred", "ztsnr"]),
        (EDM | {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
         ["edm_vpred.sigma_max", "edm_vpred.sigma_min"]),
        (EDM | {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}, ["edm_mean", "edm_std"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_sdxl_says_what_it_predicts(sdxl, tmp_path, scheduler, markers):
    """By the tensors that ComfyUI's SDXL.model_type looks for: their names, and the two sigmas' values."""
    model = shutil.copytree(sdxl, tmp_path / "sdxl")
    for file, values in (("scheduler/scheduler_config.json", scheduler), ("vae/config.json", {"latents_mean": [1.0] * 4,
                         "latents_std": [2.0] * 4})):  # fmt: skip
        (model / file).write_text(json.dumps(json.loads((model / file).read_text()) | values))
    index = json.loads((model / "model_index.json").read_text())
    if "_class_name" in scheduler:
        (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler["_class_name"]]}))
    write_checkpoint(tmp_path / "xl.safetensors", open_family(str(model)), lambda name, weight: weight, {})
    found = load_file(tmp_path / "xl.safetensors")
    assert {name for name in found if "." not in name or name.startswith("edm")} == {*markers}
    if "edm_vpred.sigma_max" in markers:
        assert (found["edm_vpred.sigma_max"].item(), found["edm_vpred.sigma_min"].item()) == (120.0, pytest.approx(0.002))
    pipe = StableDiffusionXLPipeline.from_single_file(tmp_path / "xl.safetensors", config=str(model))
    expected = UNet2DConditionModel.from_pretrained(model / "unet").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in pipe.unet.state_dict().items())


def test_a_pipeline_with_tokens_of_its_own_has_no_file(small_sd, tmp_path):
    model = shutil.copytree(small_sd, tmp_path / "model")
    tokens = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokens.add_tokens(["<my-style>"])
    tokens.save_pretrained(model / "tokenizer")
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    text.resize_token_embeddings(len(tokens))
    text.save_pretrained(model / "text_encoder")
    erase(EraseConfig(concept="<my-style>", model=str(model), output=tmp_path / "a", **QUICK))
    with pytest.raises(
        UserError, match=r"one.safetensors: the tokenizer has tokens of its own, <my-style>.* name a directory"
    ):
        merge_adapter(MergeConfig(adapter=tmp_path / "a", output=tmp_path / "one.safetensors"))
    merge_adapter(MergeConfig(adapter=tmp_path / "a", output=tmp_path / "merged"))


@pytest.mark.parametrize("which", ["flux dev", "sd3", "pixart", "z-image"])
def test_a_transformer_in_shards_merges_into_one_file(which, tmp_path, monkeypatch):
    draw_small(monkeypatch)
    model = save_family(which, tmp_path / "model")
    whole = load_file(model / "transformer" / NAME)
    transformer = open_family(str(model)).load_denoiser(torch.float32)
    shutil.rmtree(model / "transformer")
    transformer.save_pretrained(model / "transformer", max_shard_size="40KB")
    assert len([*model.glob("transformer/*.safetensors")]) > 2
    erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "a", **QUICK))
    merge_adapter(MergeConfig(adapter=tmp_path / "a", output=tmp_path / "merged"))
    record = merge_adapter(MergeConfig(adapter=tmp_path / "a", output=tmp_path / "one.safetensors"))
    assert record["verification"]["adapter_changes"] > 1e-4
    found = load_file(tmp_path / "one.safetensors")
    expected = {n: v for file in (tmp_path / "merged").glob("transformer/*.safetensors") for n, v in load_file(file).items()}
    assert found.keys() == expected.keys() == whole.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert any(not torch.equal(found[n], whole[n]) for n in found)
    assert json.loads(metadata_of(tmp_path / "one.safetensors")["esd_peft.concept"]) == ["circle"]


def test_no_tool_reads_sana_from_one_file(tmp_path):
    model = save_family("sana", tmp_path / "model")
    with pytest.raises(UserError, match="a SanaPipeline has no single-file checkpoint here"):
        write_checkpoint(tmp_path / "x", open_family(str(model)), lambda name, weight: weight, {})


@pytest.mark.parametrize("options", [{"scope": "full"}, {"scope": "esd-x", "alpha": 7.0}], ids=str)
def test_the_kohya_file_does_what_the_adapter_does(small_sd, tmp_path, options):
    erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "a", **(QUICK | options)))
    pipes = []
    for name in (KOHYA_FILE, "pytorch_lora_weights.safetensors"):
        pipe = StableDiffusionPipeline.from_pretrained(small_sd, dtype=torch.float32)
        pipe.load_lora_weights(tmp_path / "a", weight_name=name)
        pipes.append(pipe)
    by_kohya, by_diffusers = (predict(pipe.unet) for pipe in pipes)
    torch.testing.assert_close(by_kohya, by_diffusers)
    base = StableDiffusionPipeline.from_pretrained(small_sd, dtype=torch.float32)
    assert (by_kohya - predict(base.unet)).abs().max() > 1e-3


def test_headers_say_what_was_erased_from_what(small_sd, tmp_path):
    erase(EraseConfig(concept=["circle", 'a "star"'], model=str(small_sd), output=tmp_path / "a", **QUICK))
    said = metadata_of(tmp_path / "a" / KOHYA_FILE)
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "2", "2")
    assert said["ss_base_model_version"] == "sd_v1" and said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (
        json.loads(said["esd_peft.base_sha256"]) == json.loads((tmp_path / "a" / "base.json").read_text())["denoiser_sha256"]
    )
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        assert json.loads(metadata_of(tmp_path / "a" / file)["esd_peft.concept"]) == ["circle", 'a "star"']
    assert "lora_adapter_metadata" in metadata_of(tmp_path / "a" / "pytorch_lora_weights.safetensors")


def test_sdxl_loras_have_the_names_that_kohya_trains(tmp_path):
    """The checkpoint's names, which diffusers maps back."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    modules = [n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n and "to_out" not in n]
    named = {
        n: f"lora_unet_{unet_name(f'{n}.weight', unet.config).removesuffix('.weight').replace('.', '_')}" for n in modules
    }
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k" in named.values()
    file = {}
    for name in named.values():
        file |= {f"{name}.lora_down.weight": torch.zeros(1), f"{name}.lora_up.weight": torch.zeros(1)}
        file |= {f"{name}.alpha": torch.tensor(1.0)}
    found, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(file, unet.config))
    found = {key.replace(".processor", "").replace("_lora.", ".lora.") for key in found}
    assert found == {f"unet.{name}.lora.{side}.weight" for name in modules for side in ("up", "down")}


def test_wan_loras_have_the_original_names():
    """As ComfyUI reads them, which has no others for it; diffusers maps them back."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers

    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_layers=2)
    modules = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    names = {f"transformer.{n}.lora_{side}.weight" for n in modules for side in "AB"}
    file = {_original_name(name): torch.zeros(1) for name in names}
    assert "diffusion_model.blocks.0.cross_attn.k.lora_A.weight" in file
    assert _convert_non_diffusers_wan_lora_to_diffusers(file).keys() == names


def test_layers_that_comfyui_does_not_take_are_said(tmp_path):
    family = open_family(str(save_family("chroma", tmp_path / "model")))
    layers = family.scope_modules(family.empty_denoiser(), "full")
    assert limits(family, layers) == [
        "pytorch_lora_weights.safetensors: ComfyUI skips distilled_guidance_layer; merge for it"
    ]
    assert not limits(family, family.scope_modules(family.empty_denoiser(), "esd-x-ff"))


@pytest.mark.parametrize("scope", ["esd-x", "full"])
def test_an_sdxl_kohya_file_does_what_the_adapter_does(sdxl, tmp_path, scope):
    family, options = open_family(str(sdxl)), StudentOptions(scope=scope, rank=2, alpha=3.0)
    student = make_student(family, family.load_denoiser(torch.float32), options, CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in student.parameters:
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    student.save(tmp_path)
    write_kohya_lora(tmp_path, family, "xl", ["circle"], scope, {"esd_peft.base": "xl"})
    assert metadata_of(tmp_path / KOHYA_FILE)["ss_base_model_version"] == "sdxl_base_v1-0"
    inputs = torch.randn(1, 4, 16, 16, generator=generator), torch.tensor([300]), torch.randn(1, 16, 40, generator=generator)
    added = {"text_embeds": torch.randn(1, 16, generator=generator), "time_ids": torch.ones(1, 6)}
    seen = []
    for name in (KOHYA_FILE, "pytorch_lora_weights.safetensors"):
        pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
        pipe.load_lora_weights(tmp_path, weight_name=name)
        with torch.no_grad():
            seen.append(pipe.unet(*inputs, added_cond_kwargs=added).sample)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("which", ["sdxl", "sd3", "flux dev", "sana", "z-image"])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 3.0])
def test_the_file_for_diffusers_acts_as_trained_whatever_is_known_of_alpha(tmp_path, which, alpha):
    """ComfyUI, Invoke and older diffusers read B A and no metadata; newer diffusers also what the metadata says."""
    family = open_family(str(save_family(which, tmp_path / "model")))
    options = StudentOptions(rank=2, alpha=alpha, scope="esd-x")
    student = make_student(family, family.load_denoiser(torch.float32), options, CPU, torch.float32)
    for parameter in student.parameters:
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    student.save(tmp_path)
    file = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    layers = {n: m for n, m in student.denoiser.named_modules() if isinstance(m, LoraLayer)}
    assert len(file) == 2 * len(layers)
    for name, layer in layers.items():
        found = file[f"{family.denoiser_part}.{name}.lora_B.weight"] @ file[f"{family.denoiser_part}.{name}.lora_A.weight"]
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        torch.testing.assert_close(
            found.double(), alpha / 2 * up.detach().double() @ down.detach().double(), rtol=1e-5, atol=1e-5
        )
    said = json.loads(metadata_of(tmp_path / "pytorch_lora_weights.safetensors")["lora_adapter_metadata"])
    assert said[f"{family.denoiser_part}.lora_alpha"] == said[f"{family.denoiser_part}.r"] == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, []),
        ({"scope": "full"}, ["kohya's tools and stable-diffusion.cpp skip conv_in, conv_out, time_embedding"]),
        ({"scope": "selfattn"}, ["Invoke knows a LoRA's base by its attn2.to_k or attn2.to_v"]),
        ({"scope": "esd-u"}, ["skip conv_in, conv_out, time_embedding", "Invoke knows"]),
    ],
    ids=str,
)
def test_what_other_tools_leave_out_is_said(small_sd, tmp_path, capsys, options, says):
    erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "a", **(QUICK | options)))
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(says) and all(word in note for word, note in zip(says, notes, strict=True))


def test_no_file_to_be_passed_on_says_where_the_base_lay(small_sd, tmp_path):
    model = shutil.copytree(small_sd, tmp_path / "private place")
    erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "a", **QUICK))
    where = [file.name for file in sorted((tmp_path / "a").iterdir()) if str(tmp_path).encode() in file.read_bytes()]
    assert where == ["base.json", "config.yaml", "result.json"]  # from which the merge command finds it


@pytest.mark.parametrize("options", [{"adapter_type": "loha"}, {"adapter_type": "none", "rank": None}], ids=str)
def test_other_adapters_have_no_kohya_file(small_sd, tmp_path, options):
    erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "a", **(QUICK | options)))
    assert not (tmp_path / "a" / KOHYA_FILE).exists()
