"""Parts that do not work together, or want to be told more than a prompt, are refused before any work."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from esd_peft import EraseConfig, erase
from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.models.dry_run import check_steps
from esd_peft.options.model import ModelOptions
from families import save_family
from runs import SHORTEST as QUICK


@pytest.fixture
def model(small_sd, tmp_path):
    return shutil.copytree(small_sd, tmp_path / "model")


def with_unet(model, **config):
    """Another random UNet, with these fields of its config."""
    fields = dict(UNet2DConditionModel.load_config(model, subfolder="unet"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        UNet2DConditionModel.from_config(fields | config).save_pretrained(model / "unet")
    return str(model)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "wants",
    [
        {"in_channels": 9},
        {"in_channels": 8},
        {"num_class_embeds": 10},
        {"class_embed_type": "timestep"},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 12},
        {"cross_attention_dim": 20},
        {"out_channels": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_denoiser_that_wants_more_than_text(model, wants, weights):
    with pytest.raises(UserError, match=r"^--model .*: its unet is none that draws from noise and a prompt alone"):
        open_family(with_unet(model, **wants), weights=weights)


def test_a_denoiser_without_a_size(model):
    edit(model / "unet" / "config.json", sample_size=None)
    with pytest.raises(UserError, match="its unet has no sample_size in its config"):
        open_family(str(model))


def test_a_guidance_distilled_unet_is_told_what_its_pipeline_tells_it(model, tmp_path):
    family = open_family(with_unet(model, time_cond_proj_dim=12))
    assert (family.num_inference_steps, family.guidance_scale) == (4, 1.0)
    denoiser = family.load_denoiser(torch.float32)
    told = []
    denoiser.time_embedding.cond_proj.register_forward_hook(lambda module, args, out: told.append(args[0]))
    embeds = family.encode(["a circle"], torch.device("cpu"), torch.float32)
    latents = family.initial_latents(1, denoiser, torch.Generator().manual_seed(0))
    family.predict(denoiser, latents, torch.tensor([500]), embeds)
    pipe = family.pipeline(denoiser, torch.device("cpu"), torch.float32)
    pipe(**family.pipeline_arguments(embeds, embeds) | {"num_inference_steps": 1, "output_type": "latent"})
    assert len(told) == 2 and told[0].abs().max() > 0  # once: the pipeline guides without a second prediction
    torch.testing.assert_close(told[0], told[1])
    erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", **QUICK))


def test_a_tokenizer_without_a_length_reads_what_its_encoder_has_positions_for(small_sd, model):
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    assert CLIPTokenizer.from_pretrained(model, subfolder="tokenizer").model_max_length > 10**9
    cpu, prompts = torch.device("cpu"), ["a circle", ""]
    expected = open_family(str(small_sd)).encode(prompts, cpu, torch.float32)
    found = open_family(str(model)).encode(prompts, cpu, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_tokens_without_an_embedding(model):
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(model / "tokenizer")
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens and its text encoder \d+ embeddings"):
        open_family(str(model))


def test_texts_past_the_encoders_limit(small_sd, tmp_path):
    long = "a red square a blue square a green square a purple square a yellow square"
    for options in (
        {"concept": f"{long} circle"},
        {"concept": "circle", "preserve": long},
        {"concept": "circle", "map_to": long},
        {"concept": "circle", "validation_prompt": long},
    ):
        option = "--concept" if options["concept"] != "circle" else f"--{[*options][1].replace('_', '-')}"
        with pytest.raises(UserError, match=rf"^{option} '.*' is \d+ tokens long and the text encoder reads 16"):
            erase(
                EraseConfig(model=str(small_sd), output=tmp_path / "out", **QUICK | {"num_validation_images": 1} | options)
            )
    with pytest.raises(UserError, match=r"the text encoder reads 16"):
        erase(EraseConfig(concept=f"{long} circle", output=tmp_path / "out", **QUICK))
    assert not (tmp_path / "out").exists()


def test_only_a_variant_is_there(small_sd, model):
    for file in [*model.glob("*/*.safetensors")]:
        file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    with pytest.raises(UserError, match="but one of --variant fp16; add that"):
        open_family(str(model))
    assert open_family(str(model), options=ModelOptions(variant="fp16")).variant == "fp16"


def test_parts_stored_in_half_precision_are_rehearsed_in_one_dtype(tmp_path):
    """transformers gives the dtype of a config to models within the model; PyTorch may then refuse to attend."""
    path = save_family("sdxl", tmp_path / "sdxl")
    for part in ("text_encoder", "text_encoder_2"):
        edit(path / part / "config.json", dtype="bfloat16")
    family = open_family(str(path))
    for part in ("text_encoder", "text_encoder_2", "vae"):
        assert {p.dtype for p in family.empty_part(part).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("model", "steps", "kind", "says"),
    [
        ("shapes", 1000, None, "the DDIMScheduler of .* cannot take so many steps .*; use another number, 25 for example"),
        ("shapes", 1000, "DPMSolverMultistepScheduler", "not numbers"),  # two timesteps are the same
        ("shapes", 1, "PNDMScheduler", "cannot take so many steps"),
        ("qwen-image", 1, None, "not numbers"),  # its shift_terminal divides by the range of one timestep
    ],
)
def test_steps_that_a_scheduler_cannot_go(tmp_path, model, steps, kind, says):
    family = open_family(model if model == "shapes" else str(save_family(model, tmp_path / "model")))
    with pytest.raises(UserError, match=f"^--num-inference-steps {steps}: .*{says}"):
        check_steps(family, steps, "--num-inference-steps", kind)
    check_steps(family, 25, "--num-inference-steps", kind)
    if kind is None:
        options = QUICK | {"num_inference_steps": steps, "model": str(family.path), "output": tmp_path / "out"}
        with pytest.raises(UserError, match=f"^--num-inference-steps {steps}: "):
            erase(EraseConfig(concept="circle", **options))
        assert not (tmp_path / "out").exists()


def test_as_many_steps_as_a_scheduler_can_go():
    check_steps(open_family("shapes"), 999, "--num-inference-steps")
