"""Whether a part's files hold all of it: names, shapes and values, of every part and for every command."""

import json
import shutil

import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, CLIPTextModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, erase, evaluate, merge_adapter
from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.models.parts import Part
from esd_peft.models.quantize import load_quantized
from esd_peft.worlds import WORLDS
from runs import SHORTEST as QUICK

FILES = {"unet": NAME, "vae": NAME, "text_encoder": "model.safetensors"}
LAST = {"unet": "conv_out.weight", "vae": "decoder.conv_out.weight", "text_encoder": "final_layer_norm.weight"}


@pytest.fixture
def model(small_sd, tmp_path):
    return shutil.copytree(small_sd, tmp_path / "model")


def change(model, part, how):
    """Rewrite the weights of a part: `how` gets and returns them by name."""
    path = model / part / FILES[part]
    save_file({name: value.contiguous() for name, value in how(load_file(path)).items()}, path, {"format": "pt"})


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def last(part, weights):
    return next(name for name in weights if name.endswith(LAST[part]))


DAMAGES = {
    "lacks one": lambda part, w: {n: v for n, v in w.items() if n != last(part, w)},
    "all named otherwise": lambda part, w: {f"net.{n}": v for n, v in w.items()},
    "from within torch.compile": lambda part, w: {f"_orig_mod.{n}": v for n, v in w.items()},
    "from within a wrapper": lambda part, w: {f"module.{n}": v for n, v in w.items()},
    "another shape": lambda part, w: w | {last(part, w): torch.zeros(3, 5)},
    "no size": lambda part, w: w | {last(part, w): torch.zeros(0)},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", FILES)
def test_weights_that_do_not_match_are_refused(model, part, damage):
    change(model, part, lambda weights: DAMAGES[damage](part, weights))
    with pytest.raises(
        UserError, match=rf"^--model .*: its {part} (lacks weights|was saved from within|does not fit)"
    ) as error:
        open_family(str(model))
    if "from within" in damage:
        assert "unwrap it" in str(error.value)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
def test_a_fused_lora_is_named(model, part):
    names = ("q_proj", "k_proj") if part == "text_encoder" else ("to_q", "to_k")

    def fuse(weights):
        for name in [n for n in weights if n.split(".")[-2] in names]:
            module, _, leaf = name.rpartition(".")
            weights[f"{module}.base_layer.{leaf}"] = weights.pop(name)
        return weights

    change(model, part, fuse)
    with pytest.raises(UserError, match=rf"its {part} was saved from within a LoRA, as .*base_layer.* shows"):
        open_family(str(model))


@pytest.mark.parametrize("part", FILES)
def test_layers_that_the_config_does_not_know_are_refused(model, part):
    def deepen(weights):
        name = last(part, weights)
        return weights | {name.replace(name.split(".")[-2], f"{name.split('.')[-2]}.9"): weights[name].clone()}

    change(model, part, deepen)
    with pytest.raises(UserError, match=rf"its {part} has weights"):
        open_family(str(model))


def test_every_command_refuses_them(small_sd, model, tmp_path):
    erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "erased", **QUICK))
    change(model, "vae", lambda weights: DAMAGES["lacks one"]("vae", weights))
    jobs = {
        "--model": lambda out: erase(EraseConfig(concept="circle", model=str(model), output=out, **QUICK)),
        "--base": lambda out: merge_adapter(MergeConfig(adapter=tmp_path / "erased", base=str(model), output=out)),
        "--erased": lambda out: evaluate(
            EvaluateConfig(erased=model, base=str(small_sd), suite="concept", concept="circle", device="cpu", output=out)
        ),
    }
    for option, job in jobs.items():
        with pytest.raises(UserError, match=rf"^{option} .*: its vae lacks weights"):
            job(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers(model, tmp_path, small_sd, value):
    erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "erased", **QUICK))

    def poison(weights):
        for name, weight in weights.items():
            if "attn2.to_k" in name:
                weight.view(-1)[1] = value
        return weights

    change(model, "unet", poison)
    for load in (
        lambda b: b.load_denoiser(torch.float32),
        lambda b: load_quantized(b, "nf4", torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(UserError, match=r"^--model .*attn2.to_k.weight holds a value that is not a number"):
            load(open_family(str(model)))
    for output in ("merged", "merged.safetensors"):
        with pytest.raises(UserError, match=r"^--base: .*attn2.to_k.weight holds a value that is not a number"):
            merge_adapter(MergeConfig(adapter=tmp_path / "erased", base=str(model), output=tmp_path / output))
        assert not (tmp_path / output).exists()


def as_old_vae(weights):
    """The names of attention layers from before diffusers 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        weights = {n.replace(f".{new}.", f".{name}.") if "attentions" in n else n: v for n, v in weights.items()}
    return weights


def turned(weights):
    """With the prefix that other versions of transformers give, or without it."""
    return {
        n.removeprefix("text_model.") if n.startswith("text_model.") else f"text_model.{n}": v for n, v in weights.items()
    }


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("vae", as_old_vae),
        ("text_encoder", turned),
        ("text_encoder", lambda w: w | {"text_model.embeddings.position_ids": torch.arange(16)[None]}),
        ("text_encoder", lambda w: w | {"vision_model.conv.weight": torch.zeros(2), "logit_scale": torch.zeros(1)}),
    ],
    ids=["old VAE", "other prefix", "positions", "a head beside it"],
)
def test_names_that_other_versions_gave_are_as_good(small_sd, model, part, how):
    before = open_family(str(small_sd)).load_part(part).state_dict()
    change(model, part, how)
    after = open_family(str(model)).load_part(part).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_out_of_a_whole_t5(tmp_path):
    torch.manual_seed(0)
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "text_encoder")
    part = Part(tmp_path, "text_encoder", ["transformers", "T5EncoderModel"], "--model")
    part.check_weights(merged=False)
    shared = T5EncoderModel(config).state_dict()
    for names in (["shared.weight"], ["encoder.embed_tokens.weight"], ["shared.weight", "encoder.embed_tokens.weight"]):
        kept = {n: v for n, v in shared.items() if "embed" not in n and n != "shared.weight"}
        save_file(
            kept | {n: shared["shared.weight"].clone() for n in names}, tmp_path / "text_encoder" / "model.safetensors"
        )
        part.check_weights(merged=False)


def test_a_base_in_few_bits_is_refused_before_training(model, tmp_path):
    edit(model / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match="its unet is quantized"):
        open_family(str(model))
    edit(model / "unet" / "config.json", quantization_config={})
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    change(model, "unet", lambda weights: {n: v.to(torch.float8_e4m3fn) for n, v in weights.items()})
    with pytest.raises(UserError, match=r"its unet stores .* as F8_E4M3, too coarse to erase from"):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", **QUICK))


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("kind", ["I8", "I64", "BOOL"])
def test_whole_numbers_are_no_weights(model, part, kind):
    dtypes = {"I8": torch.int8, "I64": torch.int64, "BOOL": torch.bool}
    change(model, part, lambda weights: weights | {last(part, weights): weights[last(part, weights)].to(dtypes[kind])})
    with pytest.raises(UserError, match=f"its {part} stores .* as {kind}, which is no weight"):
        open_family(str(model))


@pytest.mark.parametrize("part", FILES)
def test_a_dtype_that_nobody_has_is_refused(model, part):
    """The same bytes of one tensor under the name of another dtype of 16 bits."""
    change(model, part, lambda weights: {n: v.half() for n, v in weights.items()})
    path = model / part / FILES[part]
    content = path.read_bytes()
    name = last(part, load_file(path)).encode()
    at = content.index(b'"F16"', content.index(b'"' + name + b'"'))
    path.write_bytes(content[:at] + b'"U16"' + content[at + 5 :])
    with pytest.raises(UserError, match=f"its {part} stores .* as U16; use 16 or 32 bits"):
        open_family(str(model))


def test_positions_may_be_counted(model):
    """Files of transformers 4.30 and before hold the positions of tokens, in whole numbers."""
    change(model, "text_encoder", lambda weights: weights | {"text_model.embeddings.position_ids": torch.arange(16)[None]})
    open_family(str(model))


def test_numbers_of_the_vae_are_checked_without_images(model):
    change(model, "vae", lambda weights: weights | {last("vae", weights): weights[last("vae", weights)] * float("nan")})
    with pytest.raises(UserError, match=r"its vae: decoder.conv_out.weight holds a value that is not a number"):
        open_family(str(model))


@pytest.mark.parametrize("how", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_quantized_text_encoder_encodes_or_is_refused(tmp_path, how):
    """As transformers saves it, and with a config that says so of weights that are not."""
    model = shutil.copytree(WORLDS["shapes"].pipeline, tmp_path / "model")  # bitsandbytes wants sizes that 32 divides
    plain = open_family(str(model)).encode(["a red circle"], torch.device("cpu"), torch.float32)["encoder_hidden_states"]
    quantized = CLIPTextModel.from_pretrained(model / "text_encoder", quantization_config=BitsAndBytesConfig(**how))
    edit(model / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes", **how})
    with pytest.raises(UserError, match="its text_encoder holds weights that are not quantized, though its config"):
        open_family(str(model))
    quantized.save_pretrained(model / "text_encoder")
    found = open_family(str(model)).encode(["a red circle"], torch.device("cpu"), torch.float32)["encoder_hidden_states"]
    assert 0 < (found - plain).norm() < 0.2 * plain.norm()


WRONG = [
    ("scheduler", {"num_train_timesteps": "many"}),
    ("scheduler", {"num_train_timesteps": -3}),
    ("scheduler", {"num_train_timesteps": 10**12}),
    ("scheduler", {"beta_start": "low"}),
    ("scheduler", {"beta_end": float("nan")}),
    ("scheduler", {"prediction_type": "x"}),
    ("scheduler", {"timestep_spacing": 7}),
    ("unet", {"sample_size": "big"}),
    ("unet", {"sample_size": None}),
    ("unet", {"sample_size": 10**9}),
    ("unet", {"layers_per_block": 10**9}),
    ("unet", {"block_out_channels": 3}),
    ("unet", {"attention_head_dim": 0}),
    ("unet", {"norm_num_groups": 7}),
    ("vae", {"scaling_factor": "a"}),
    ("vae", {"scaling_factor": None}),
    ("vae", {"block_out_channels": "8"}),
    ("vae", {"shift_factor": [1]}),
    ("text_encoder", {"num_hidden_layers": 10**7}),
    ("text_encoder", {"num_attention_heads": 5}),
    ("text_encoder", {"hidden_act": "nothing"}),
    ("tokenizer", {"model_max_length": "long"}),
]


@pytest.mark.parametrize(("part", "values"), WRONG, ids=str)
def test_config_values_that_cannot_be(model, part, values):
    named = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
    edit(model / part / named, **values)
    with pytest.raises(UserError, match=rf"^--model .*: its .*{part}"):
        open_family(str(model))


@pytest.mark.parametrize("text", ["", "{", "[]", "\ud800"])
@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json",
                                  "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])  # fmt: skip
def test_configs_that_are_no_json(model, file, text):
    (model / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"^--model .*: its "):
        open_family(str(model))
