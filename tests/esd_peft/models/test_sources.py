"""Hub ids, variants, the hub's cache, single-file checkpoints: each opens as the directory it came from."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from esd_peft import EraseConfig
from esd_peft.adapters.export import write_checkpoint
from esd_peft.errors import UserError
from esd_peft.models import conversion, open_family
from esd_peft.options.model import ModelOptions
from esd_peft.worlds import WORLDS
from hub import COMMIT, fill_cache, serve
from pipelines import small_stable_diffusion
from sources import open_in_new_process

EMBEDDED = WORLDS["shapes"].pipeline


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A hub home of its own for what is converted."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def with_extras(small_sd, tmp_path_factory):
    """A repository as publishers have them: pickles, other variants, a checkpoint in the root, a card."""
    repo = shutil.copytree(small_sd, tmp_path_factory.mktemp("repos") / "sd")
    pipe = small_stable_diffusion(tmp_path_factory.mktemp("fp16") / "sd", dtype=torch.float16, variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        shutil.copytree(pipe / part, repo / part, dirs_exist_ok=True)
    (repo / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (repo / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"large")
    (repo / "v1-5.safetensors").write_bytes(b"large")
    (repo / "README.md").write_text("---\nlicense: openrail\n---\n")
    return repo


def test_a_hub_id_downloads_only_what_is_needed_and_then_works_offline(with_extras, tmp_path):
    calls = [
        ("owner/configs", {"weights": False}),
        ("owner/sd", {}),
        ("owner/sd", {"variant": "fp16"}),
        ("owner/sd", {"revision": "v9"}),
        ("owner/gated", {}),
        ("owner/nothing", {}),
        ("owner/wan", {}),
    ]
    second = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": second, "transformer_2": second, "boundary_ratio": 0.875}
    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "wan" / "weights.safetensors").write_bytes(b"large")
    repos = {"owner/sd": with_extras, "owner/configs": with_extras, "owner/wan": tmp_path / "wan"}
    with serve(repos, gated="owner/gated") as (address, asked):
        said = open_in_new_process(calls, HF_HOME=tmp_path / "home", HF_ENDPOINT=address)
    configs, path, variant, revision, gated, missing, wan = said
    assert "owner--configs" in configs and not list(Path(configs).rglob("*.safetensors"))
    weights = list(dict.fromkeys(name for name in asked if name.endswith((".safetensors", ".bin", ".ckpt"))))
    plain = {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
             "text_encoder/model.safetensors"}  # fmt: skip
    assert set(weights[:3]) == plain
    assert set(weights[3:]) == {name.replace(".safetensors", ".fp16.safetensors") for name in plain}
    assert "README.md" in asked
    assert path == variant and path.endswith(f"models--owner--sd/snapshots/{COMMIT}")
    assert revision == "--model owner/sd at --revision v9 is not on the hub; check the revision's name"
    assert gated.startswith("--model owner/gated is gated;") and "hf auth login" in gated
    assert missing.startswith("--model owner/nothing is neither here nor on the hub;")
    assert "owner--wan" in wan and "has two transformers" in wan and "weights.safetensors" not in asked
    (again,) = open_in_new_process([("owner/sd", {"variant": "fp16"})], HF_HOME=tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again == path


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub client's attempts
    with pytest.raises(UserError, match="--model owner/sd is not all in the hub's cache, and the hub cannot be reached"):
        open_family("owner/sd")


def test_the_hubs_cache_is_enough_when_offline(small_sd, tmp_path):
    snapshot = fill_cache(tmp_path / "home" / "hub", "owner/sd", small_sd)
    fill_cache(tmp_path / "home" / "hub", "owner/sd", small_sd, revision="v2", commit=COMMIT[::-1])
    offline = {"HF_HOME": tmp_path / "home", "HF_HUB_OFFLINE": "1"}
    calls = [("owner/sd", {}), ("owner/sd", {"revision": "v2"}), ("owner/sd", {"revision": COMMIT}), ("owner/no", {})]
    first, second, third, absent = open_in_new_process(calls, **offline)
    assert first == third == str(snapshot)
    assert second == str(snapshot.with_name(COMMIT[::-1]))
    assert "hub's cache" in absent


def test_a_variant_is_read_where_a_part_has_it(small_sd, tmp_path):
    model = shutil.copytree(small_sd, tmp_path / "model")
    other = small_stable_diffusion(tmp_path / "fp16", dtype=torch.float32, variant="fp16", max_shard_size="300KB")
    shutil.rmtree(model / "unet")
    shutil.copytree(other / "unet", model / "unet")
    family = open_family(str(model), options=ModelOptions(variant="fp16"))
    assert len(family.denoiser_files()) > 1 and all(".fp16" in file.name for file in family.denoiser_files())
    expected = UNet2DConditionModel.from_pretrained(model, subfolder="unet", variant="fp16").state_dict()
    found = family.load_denoiser(torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert family.load_part("vae") is not None  # has the plain files only
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        open_family(str(model)).load_denoiser(torch.float32)


def test_pickles_are_read_on_request_only(small_sd, tmp_path, home):
    model = shutil.copytree(small_sd, tmp_path / "model")
    unet = UNet2DConditionModel.from_pretrained(small_sd, subfolder="unet")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(model / "unet", safe_serialization=False)
    assert (model / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(UserError, match="--allow-pickle"):
        open_family(str(model)).load_denoiser(torch.float32)
    found = open_family(str(model), options=ModelOptions(allow_pickle=True)).load_denoiser(torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in unet.state_dict().items())
    assert home.is_dir() and not list(model.glob("**/*.safetensors.tmp"))
    (tmp_path / "sd.ckpt").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"sd\.ckpt is a pickle, which can run code;"):
        open_family(str(tmp_path / "sd.ckpt"))
    with pytest.raises(UserError, match="cannot be read"):
        open_family(str(tmp_path / "sd.ckpt"), options=ModelOptions(allow_pickle=True))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_pickles_in_shards_become_safetensors_of_the_same_values(small_sd, tmp_path, home, part):
    model, stem = shutil.copytree(small_sd, tmp_path / "model"), {"unet": NAME}.get(part, "model.safetensors")
    pickled = "diffusion_pytorch_model" if part == "unet" else "pytorch_model"
    values = [*load_file(model / part / stem).items()]
    halves = {f"{pickled}-0000{i}-of-00002.bin": dict(values[i - 1 :: 2]) for i in (1, 2)}
    (model / part / stem).unlink()
    for name, half in halves.items():
        torch.save({key: value.half() for key, value in half.items()}, model / part / name)
    index = {"metadata": {}, "weight_map": {key: name for name, half in halves.items() for key in half}}
    (model / part / f"{pickled}.bin.index.json").write_text(json.dumps(index))
    (model / "LICENSE").write_text("mine")
    with pytest.raises(UserError, match="--allow-pickle"):
        open_family(str(model))
    family = open_family(str(model), options=ModelOptions(allow_pickle=True))
    tensors = {key: value for file in family.part(part).weights.files for key, value in load_file(file).items()}
    found = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    assert found.keys() == dict(values).keys()
    assert all(torch.equal(found[key], value.half()) for key, value in values)
    assert (family.path / "LICENSE").read_text() == "mine" and not [*family.path.rglob("*.bin*")]


def test_a_checkpoint_that_holds_itself_is_none(small_sd, tmp_path, home):
    inner = {}
    inner["state_dict"] = inner
    torch.save(inner, tmp_path / "circle.ckpt")
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        open_family(str(tmp_path / "circle.ckpt"), options=ModelOptions(allow_pickle=True, checkpoint_config=str(small_sd)))


@pytest.mark.parametrize("change", ["int8", "int64", "bool", "fp8", "scales"])
def test_a_checkpoint_whose_weights_are_no_values_is_refused(checkpoint, small_sd, tmp_path, home, change):
    kinds = {"int8": torch.int8, "int64": torch.int64, "bool": torch.bool, "fp8": torch.float8_e4m3fn}
    weights = load_file(checkpoint)
    name = next(name for name in weights if name.startswith("cond_stage_model") and name.endswith("q_proj.weight"))
    changed = {name.removesuffix("weight") + "scale_weight": torch.ones(1)} if change == "scales" else {}
    changed |= {name: weights[name].to(kinds[change])} if change in kinds else {}
    save_file(weights | changed, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"holds weights in 8 bits or whole numbers \(cond_stage_model"):
        open_family(str(tmp_path / "odd.safetensors"), options=ModelOptions(checkpoint_config=str(small_sd)))


@pytest.mark.parametrize("variant", ["*", "fp1?", "../x", "", "a.b"])
def test_a_variant_is_a_name(variant):
    with pytest.raises(UserError, match=r"^--variant: "):
        ModelOptions(variant=variant)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"revision": "v2"}, "--revision works with a hub id only"),
        ({"checkpoint_config": "x"}, "--checkpoint-config works with a single-file"),
        ({"variant": "bf16"}, "--variant bf16: --model .* has no weights of that name"),
    ],
)
def test_options_that_do_nothing_are_refused(small_sd, options, says):
    with pytest.raises(UserError, match=says):
        open_family(str(small_sd), options=ModelOptions(**options))


def test_links_and_parts_outside_the_directory_are_refused(small_sd, tmp_path):
    model = shutil.copytree(small_sd, tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (model / "tokenizer" / "notes.txt").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer/notes.txt links out of the directory"):
        open_family(str(model))
    (model / "tokenizer" / "notes.txt").unlink()
    (model / "tokenizer" / "notes.txt").symlink_to(model / "model_index.json")
    open_family(str(model))
    shutil.move(model / "vae", tmp_path / "vae")
    (model / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(UserError, match="vae links out"):
        open_family(str(model))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"../vae": index["vae"]}))
    with pytest.raises(UserError, match=r"calls a part '\.\./vae', which is no folder's name"):
        open_family(str(model))


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "..", "", "vae/../vae", "Ünet\n"])
def test_the_names_of_parts_are_names_of_folders(small_sd, tmp_path, name):
    model = shutil.copytree(small_sd, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {name: index["vae"]}))
    with pytest.raises(UserError, match=r"model_index.json calls a part .*, which is no folder's name"):
        open_family(str(model))


@pytest.mark.parametrize("name", ["tokenizer/tokenizer_config.json", "unet/diffusion_pytorch_model.safetensors", "vae"])
def test_links_in_a_circle_are_refused(small_sd, tmp_path, name):
    model = shutil.copytree(small_sd, tmp_path / "model")
    shutil.move(model / name, tmp_path / "away")
    (model / name).symlink_to(model / name)
    with pytest.raises(UserError, match=rf"{name} is a link in a circle"):
        open_family(str(model))


def test_a_directory_link_to_a_model_and_a_cache_snapshot_are_fine(small_sd, tmp_path):
    (tmp_path / "link").symlink_to(small_sd)
    open_family(str(tmp_path / "link"))
    snapshot = fill_cache(tmp_path / "hub", "owner/sd", small_sd)
    family = open_family(str(snapshot))
    assert family.name == "owner/sd"


@pytest.mark.parametrize(
    ("name", "says"),
    [("sd.safetensors", "sd.safetensors is not there"), ("models/sd.safetensors", "is not there"), ("sd", "is not there")],
)
def test_files_that_are_not_there(name, says):
    with pytest.raises(UserError, match=says):
        open_family(name)


def test_files_that_are_no_checkpoint(small_sd, tmp_path):
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        open_family(str(small_sd / "unet" / "diffusion_pytorch_model.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"cut\.safetensors cannot be read"):
        open_family(str(tmp_path / "cut.safetensors"))


def test_configs_that_do_not_fit_a_checkpoint(small_sd, tmp_path, home):
    write_checkpoint(tmp_path / "sd.safetensors", open_family(str(small_sd)), lambda name, weight: weight, {})
    with pytest.raises(UserError, match="does not fit its configs"):
        open_family(str(tmp_path / "sd.safetensors"), options=ModelOptions(checkpoint_config=str(EMBEDDED)))
    with pytest.raises(UserError, match=r"--checkpoint-config .* no model_index"):
        open_family(str(tmp_path / "sd.safetensors"), options=ModelOptions(checkpoint_config=str(tmp_path)))
    assert not list(home.glob("**/model_index.json"))
    home.rename(home.with_name("old"))
    home.write_text("a file where the hub's home should be")
    with pytest.raises(UserError, match=r"HF_HOME .* cannot be written"):
        open_family(str(tmp_path / "sd.safetensors"), options=ModelOptions(checkpoint_config=str(small_sd)))


@pytest.fixture(scope="module")
def checkpoint(small_sd, tmp_path_factory):
    """The small pipeline as one file."""
    path = tmp_path_factory.mktemp("checkpoints") / "sd.safetensors"
    write_checkpoint(path, open_family(str(small_sd)), lambda name, weight: weight, {})
    return path


def changed(checkpoint, path, how):
    save_file(how(load_file(checkpoint)), path, {"format": "pt"})
    return path


def opened(path, config):
    return open_family(str(path), options=ModelOptions(checkpoint_config=str(config)))


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ({}, {"prediction_type": "epsilon"}),
        ({"v_pred": []}, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False}),
        (
            {"v_pred": [], "ztsnr": []},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
        ({"ztsnr": []}, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        (
            {"edm_vpred.sigma_max": 90.0, "v_pred": []},
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction", "sigma_max": 90.0, "sigma_min": 0.002},
        ),
        (
            {"edm_mean": [0.1] * 4, "edm_std": [2.0] * 4},
            {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_data": 0.5},
        ),
    ],
    ids=lambda value: "+".join(value),
)
def test_what_a_checkpoint_says_of_itself_goes_before_its_configs(small_sd, checkpoint, tmp_path, home, markers, expected):
    tensors = {name: torch.tensor(value) for name, value in markers.items()}
    path = changed(checkpoint, tmp_path / "marked.safetensors", lambda weights: weights | tensors)
    family = opened(path, small_sd)
    found = json.loads((family.path / "scheduler" / "scheduler_config.json").read_text())
    assert {name: found.get(name, False) for name in expected} == expected
    if "edm_mean" in markers:
        assert family.load_config("vae")["latents_std"] == [2.0] * 4
    bits = open_family(str(small_sd)).load_denoiser(torch.float32).state_dict()
    assert all(torch.equal(bits[name], value) for name, value in family.load_denoiser(torch.float32).state_dict().items())


def test_a_conversion_changes_with_the_contents_it_is_made_from(small_sd, checkpoint, tmp_path, home):
    config, path = shutil.copytree(small_sd, tmp_path / "config"), shutil.copyfile(checkpoint, tmp_path / "sd.safetensors")
    first = opened(path, config).path
    elsewhere = shutil.copytree(config, tmp_path / "elsewhere" / "config")
    assert opened(path, elsewhere).path == first  # the same contents
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    second = opened(path, config)
    assert second.path != first and not second.noise_schedule.predicts_noise
    before = path.stat()
    changed(checkpoint, path, lambda weights: {name: 2 * value for name, value in weights.items()})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # a copy may keep the time, and the size is the same
    third = opened(path, config)
    assert third.path not in (first, second.path)


def test_a_checkpoint_that_lacks_weights_or_has_more(small_sd, checkpoint, tmp_path, home):
    head = "model.diffusion_model."

    def with_ema(weights):
        ema = {f"model_ema.{n.removeprefix(head).replace('.', '')}": 0 * v for n, v in weights.items() if n.startswith(head)}
        positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}
        return weights | ema | positions | {"betas": torch.rand(1000)}

    plain = opened(checkpoint, small_sd).load_denoiser(torch.float32).state_dict()
    more = opened(changed(checkpoint, tmp_path / "ema.safetensors", with_ema), small_sd)
    assert all(torch.equal(plain[name], value) for name, value in more.load_denoiser(torch.float32).state_dict().items())
    for lost in (f"{head}out.2.weight", "first_stage_model.decoder.conv_out.weight",
                 "cond_stage_model.transformer.text_model.final_layer_norm.weight"):  # fmt: skip
        less = changed(
            checkpoint, tmp_path / "less.safetensors", lambda w, lost=lost: {n: v for n, v in w.items() if n != lost}
        )
        with pytest.raises(UserError, match=r"less\.safetensors (lacks weights of its|does not fit its configs)"):
            opened(less, small_sd)
    old = "cond_stage_model.transformer."
    anime = changed(
        checkpoint, tmp_path / "old.safetensors", lambda w: {n.replace(f"{old}text_model.", old): v for n, v in w.items()}
    )
    with pytest.raises(UserError, match=r"old\.safetensors (lacks weights of its|does not fit its configs)"):
        opened(anime, small_sd)


def test_config_names_the_options():
    assert EraseConfig(concept="x", model="a/b", revision="r", variant="fp16").pretrained.variant == "fp16"


def test_markers_have_no_say_in_the_dtype():
    weights = {"a": torch.zeros(2, 2, dtype=torch.float16), "v_pred": torch.zeros(0), "logit_scale": torch.zeros(())}
    assert conversion._dtype(weights) == torch.float16
    assert conversion._dtype(weights | {"b": torch.zeros(2)}) == torch.float32


def test_a_private_checkpoint_is_converted_in_private(checkpoint, small_sd, tmp_path, home):
    (tmp_path / "mine").mkdir(mode=0o700)
    shutil.copyfile(checkpoint, tmp_path / "mine" / "own.safetensors")
    found = open_family(str(tmp_path / "mine" / "own.safetensors"), options=ModelOptions(checkpoint_config=str(small_sd)))
    assert {path.stat().st_mode & 0o077 for path in found.path.rglob("*")} == {0}
