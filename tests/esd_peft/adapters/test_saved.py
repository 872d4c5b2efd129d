"""Adapters of every kind that PEFT has: merged as PEFT's own `merge_and_unload` does it, or refused by name."""

import dataclasses
import json
import os
import time
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file
from torch import nn

from esd_peft.adapters import peft_config
from esd_peft.adapters.merge import merge_weight
from esd_peft.adapters.saved import read_adapter
from esd_peft.adapters.verify import Verification
from esd_peft.errors import UserError

LINEAR = ["to_k", "to_out.0"]


class Net(nn.Module):
    """Layers with and without a bias, a convolution, and a norm, as denoisers have."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.to_k = nn.Linear(64, 64, bias=False)
            self.to_out = nn.ModuleList([nn.Linear(64, 64)])
            self.conv = nn.Conv2d(8, 16, 3, padding=1)
            self.norm = nn.LayerNorm(64)


def saved(path, config, dtype=torch.float32, seed=1, size=0.05):
    """A PEFT adapter that has learned something in all that its config trains."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(Net(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape))
        model.save_pretrained(path)
    if dtype != torch.float32:
        file = path / "adapter_model.safetensors"
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    return path


def merged_here(path, scale=1.0):
    """All weights after our merge, each verified as the merge command does it."""
    net, verification = Net(), Verification()
    weights = dict(net.state_dict())
    for name, change in read_adapter(path, scale).changes(net).items():
        inputs = verification.inputs(name, weights[name], [change])
        merged, effect = merge_weight(weights[name], [change], inputs)
        verification.check(name, weights[name], merged, [change], effect)
        weights[name] = merged
    return weights


def merged_by_peft(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(Net(), path).merge_and_unload().state_dict()


def assert_same(found, expected):
    start = Net().state_dict()
    assert found.keys() == start.keys() == expected.keys()
    for name in start:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(expected[name], start[name]) for name in start)


LORA = {
    "plain": {},
    "convolution": {"target_modules": ["conv", "to_k"]},
    "dropout": {"lora_dropout": 0.5},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["to_out.0", "conv"]},
    "DoRA": {"use_dora": True, "target_modules": ["to_k", "to_out.0", "conv"]},
    "rank-stabilized": {"use_rslora": True, "lora_alpha": 5},
    "modules_to_save": {"modules_to_save": ["conv", "norm"]},
    "patterns": {"rank_pattern": {"to_k": 3, r"to_out\.\d": 4}, "alpha_pattern": {"(to_k|other)": 9}},
    "targets by pattern": {"target_modules": r".*(to_k|conv)"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA, orthogonal": {"init_lora_weights": "orthogonal"},
    "KaSA": {"kasa_config": KasaConfig()},
    "BD-LoRA": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["to_k"], target_modules_bd_b=["to_out"], nblocks=2)},
}


@pytest.mark.parametrize("options", LORA.values(), ids=LORA)
def test_loras_merge_as_peft_merges_them(tmp_path, options):
    path = saved(tmp_path / "a", peft.LoraConfig(**({"r": 2, "target_modules": LINEAR} | options)))
    assert_same(merged_here(path), merged_by_peft(path))


def kinds():
    """A config of each method that wraps layers."""
    sizes = {
        "OFT": {"r": 0, "oft_block_size": 4},
        "C3A": {"block_size": 8},
        "FOURIERFT": {"n_frequency": 20},
        "WAVEFT": {"n_frequency": 20},
        "ADALORA": {"init_r": 2, "target_r": 2, "total_step": 10},
        "IA3": {"feedforward_modules": ["to_out.0"]},
        "LN_TUNING": {"target_modules": ["norm"]},
        "BEFT": {"target_modules": ["to_out.0"]},
        "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2, "r": 2},
        "ROAD": {"group_size": 8},
    }
    for kind, made in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        fields = {field.name for field in dataclasses.fields(made)}
        if "target_modules" in fields and kind not in ("LORA", "ADAMSS", "SHADOW", "ADAPTION_PROMPT", "XLORA"):
            rank = {"r": 2} if "r" in fields and kind != "ADALORA" else {}
            yield pytest.param(made, {"target_modules": LINEAR} | rank | sizes.get(kind.value, {}), id=kind.value)


MERGED = {"ADALORA", "BEFT", "BOFT", "C3A", "DELORA", "FOURIERFT", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "ROAD"}


@pytest.mark.parametrize(("made", "options"), kinds())
def test_other_methods_merge_as_peft_merges_them_or_are_refused_by_name(tmp_path, made, options):
    config = made(**options)
    path = saved(tmp_path / "a", config)
    kind, refused = config.peft_type.value, ""
    try:
        assert_same(merged_here(path), merged_by_peft(path))
    except UserError as error:
        refused = str(error)
    assert not refused or (kind in refused and kind not in MERGED and "\n" not in refused)


@pytest.mark.parametrize("method", [peft.LoraConfig(r=2, target_modules=LINEAR, bias="all"), peft.IA3Config(
    target_modules=LINEAR, feedforward_modules=["to_k"])], ids=lambda config: config.peft_type.value)  # fmt: skip
def test_a_scale_is_a_straight_line_from_the_base_for_every_method(tmp_path, method):
    path = saved(tmp_path / "a", method)
    start, whole, half = Net().state_dict(), merged_here(path), merged_here(path, 0.5)
    for name in start:
        torch.testing.assert_close(half[name], start[name] + 0.5 * (whole[name] - start[name]), rtol=1e-5, atol=1e-6)


def several(paths):
    """The weights of `to_k` and `to_out.0` after our merge of several adapters at once, each verified."""
    net, verification = Net(), Verification()
    found = [read_adapter(path).changes(net) for path in paths]
    weights = {}
    for name in ("to_k.weight", "to_out.0.weight"):
        base, changes = net.state_dict()[name], [each[name] for each in found]
        merged, effect = merge_weight(base, changes, verification.inputs(name, base, changes))
        verification.check(name, base, merged, changes, effect)
        weights[name] = merged
    return weights


@torch.no_grad()
def all_active(paths):
    """The same weights as PEFT computes with all adapters active: what its layers make of unit vectors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(Net(), paths[0], adapter_name="0")
        for i, path in enumerate(paths[1:], 1):
            model.load_adapter(path, adapter_name=str(i))
    model.base_model.set_adapter([str(i) for i in range(len(paths))])
    layers = {name: model.eval().base_model.model.get_submodule(name) for name in LINEAR}
    return {f"{name}.weight": (layer(torch.eye(64)) - layer(torch.zeros(1, 64))).T for name, layer in layers.items()}


def differ(one, other):
    """How far, of how much `one` differs from the base."""
    base = Net().state_dict()
    return max(((one[name] - other[name]).norm() / (one[name] - base[name]).norm()).item() for name in one)


TOGETHER = {
    "LoRA": (peft.LoraConfig, {"r": 2}, 1e-5),
    "LoHa": (peft.LoHaConfig, {"r": 2}, 1e-5),
    "LoKr": (peft.LoKrConfig, {"r": 2}, 1e-5),
    "HIRA": (peft.PEFT_TYPE_TO_CONFIG_MAPPING.get("HIRA"), {"r": 2}, 1e-4),
    "PEANUT": (peft.PEFT_TYPE_TO_CONFIG_MAPPING.get("PEANUT"), {"r": 2}, 1e-4),
    "DEFT": (peft.PEFT_TYPE_TO_CONFIG_MAPPING.get("DEFT"), {"r": 2}, 1e-4),
    # PEFT multiplies DoRA's magnitudes, which are 1 + a change: what is left are products of changes
    "DoRA": (peft.LoraConfig, {"r": 2, "use_dora": True}, 0.01),
}


@pytest.mark.parametrize(
    ("made", "options", "near"),
    [case for case in TOGETHER.values() if case[0]],
    ids=[k for k, v in TOGETHER.items() if v[0]],
)
def test_several_adapters_are_what_peft_computes_with_all_of_them_in_any_order(tmp_path, made, options, near):
    config = made(target_modules=LINEAR, **options)
    paths = [saved(tmp_path / str(seed), config, seed=seed, size=0.005) for seed in (1, 2)]
    merged = several(paths)
    assert differ(merged, several(paths[::-1])) < 1e-5
    assert differ(all_active(paths), merged) < near
    assert differ(several(paths[:1]), merged) > 0.3, "the other one does something"


@pytest.mark.parametrize("kind", ["BOFT", "HRA", "IA3", "OFT", "ROAD"])
def test_kinds_that_multiply_what_they_meet_do_not_add_up(tmp_path, kind):
    made, options = next(p.values for p in kinds() if p.id == kind)
    path, lora = saved(tmp_path / "a", made(**options)), saved(tmp_path / "b", peft.LoraConfig(r=2, target_modules=LINEAR))
    assert not any(change.adds for change in read_adapter(path).changes(Net()).values())
    assert all(change.adds for change in read_adapter(lora).changes(Net()).values())


@pytest.mark.parametrize("begins", ["pissa", "olora"])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_of_an_adapter_that_begins_with_the_base_is_no_adapter(tmp_path, begins, half):
    path = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR, init_lora_weights=begins))
    file = path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not ("to_k" in name and half in name)}, file)
    with pytest.raises(UserError):
        merged_here(path)


NAMED = {
    "ends of names": {"target_modules": LINEAR},
    "a pattern": {"target_modules": r"(to_k|to_out\.\d)"},
    "all but the convolution": {"target_modules": [*LINEAR, "conv"], "exclude_modules": ["conv"]},
    "saved as a whole": {"target_modules": [*LINEAR, "conv"], "modules_to_save": ["conv"]},
    "some layers": {"target_modules": ["0", "1"], "layers_to_transform": [0], "layers_pattern": "blocks"},
}


@pytest.mark.parametrize("options", NAMED.values(), ids=NAMED)
def test_layers_without_tensors_are_those_that_peft_wraps(tmp_path, options):
    class Deep(Net):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for _ in range(2)])

    config = peft.LoraConfig(r=2, **options)
    model = peft.get_peft_model(Deep(), config)
    wrapped = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    model.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    assert adapter.notes(Deep()) == []
    layers = [name for name, module in Deep().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert {*peft_config.targeted(config, layers, peft_config.Patterns(tmp_path))} == wrapped
    gone = sorted(wrapped)[0]
    adapter.tensors = {name: value for name, value in adapter.tensors.items() if f".{gone}." not in name}
    (note,) = adapter.notes(Deep())
    assert f"no tensors for 1 of the {len(wrapped)} layers that its config names, {gone} first" in note


def test_an_adapter_in_half_precision_is_verified_in_single(tmp_path):
    path = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR), torch.float16)
    assert_same(merged_here(path), merged_by_peft(path))


def test_the_model_that_is_evaluated_is_the_merged_one(tmp_path):
    path = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR, bias="all", lora_dropout=0.3))
    assert_same(dict(read_adapter(path).apply(Net()).state_dict()), merged_by_peft(path))


def edited(path, **values):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["conv.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"use_something_new": True}, "use_something_new, which this version of peft does not know"),
        ({"peft_type": "NEW"}, "kind that this version of peft does not know"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
        ({"peft_type": ["LORA"]}, "does not know"),
        ({"peft_type": "XLORA", "adapters": {"a": "owner/name"}}, "XLORA, which does not change weights"),
        ({"peft_type": "SHADOW", "shadow_model": "owner/name"}, "SHADOW, which does not change weights|does not know"),
        ({"peft_type": "PEANUT", "depth": 65536}, "depth 65536, which is more than any layer has"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 65536}, "num_cayley_neumann_terms 65536"),
        ({"peft_type": "PSOFT", "psoft_svd_lowrank_niter": 129}, "psoft_svd_lowrank_niter 129"),
        ({"peft_type": "HRA", "r": 129}, "r 129"),
        ({"peft_type": "HRA", "r": 8, "rank_pattern": {"to_k": 65536}}, "to_k 65536"),
        ({"r": 10**9}, "r 1000000000"),
        ({"r": 60_000}, "does not fit"),
        ({"r": "many"}, "adapter_config.json|does not fit"),
        ({"r": -1}, "adapter_config.json|does not fit"),
        ({"lora_alpha": float("nan")}, "adapter_config.json|does not fit"),
        ({"rank_pattern": {"to_k": 10**8}}, "to_k 100000000"),
        ({"rank_pattern": {"((((a{99}){99}){99}){99})": 2}}, "not a plain one"),
        ({"rank_pattern": {"(?R)?a": 2}}, "not a plain one"),
        ({"rank_pattern": {"a" * 1000: 2}}, "not a plain one"),
        ({"rank_pattern": {"(": 2}}, "not matched"),
        ({"use_dora": True}, "there is no"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_config_must_not_ask_for(tmp_path, values, says):
    path = edited(saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR)), **values)
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as error:
        merged_here(path)
    assert "\n" not in str(error.value) and time.monotonic() - start < 20


def test_patterns_have_some_time_together(monkeypatch, tmp_path):
    monkeypatch.setattr(peft_config, "SECONDS", 0.5)
    patterns = peft_config.Patterns(tmp_path)
    assert patterns.first(["to_q", r"blocks\.\d+\..*to_k"], "up.blocks.3.attn.to_k") == r"blocks\.\d+\..*to_k"
    start = time.monotonic()
    for _ in range(5):
        with pytest.raises(UserError, match=r"adapter_config.json asks for the pattern '\(o\|o\|oo\)\+x'"):
            patterns.first(["(o|o|oo)+x"], "o" * 80)
    assert time.monotonic() - start < 5


def test_targets_by_a_pattern_that_hangs_are_not_matched_at_all(tmp_path):
    """The layers are those that the file has tensors for."""
    path = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR))
    expected = merged_by_peft(path)
    assert_same(merged_here(edited(path, target_modules="(.*.*)*x", exclude_modules="(.*.*)*x")), expected)


def test_tensors_that_nothing_reads_are_refused(tmp_path):
    path = saved(tmp_path / "a", peft.LoraConfig(r=2, target_modules=LINEAR))
    file = path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.to_k.lora_magnitude_vector": torch.ones(64)}, file)
    with pytest.raises(UserError, match=r"there is no use for .*lora_magnitude_vector"):
        merged_here(path)


def test_each_kind_of_change_is_tried_before_any_work(tmp_path):
    """Also where the first tensors of the file take the place of the base's own, and are no reason to complain."""
    path = saved(tmp_path / "a", peft.LoraConfig(target_modules=LINEAR, modules_to_save=["norm"]))
    adapter = read_adapter(path)
    assert any("norm" in name for name in adapter.fitting(Net()))
    edited(path, lora_alpha=float("inf"))
    with pytest.raises(UserError, match="there are NaN or infinite values in it"):
        read_adapter(path).fitting(Net())


def test_a_pipe_in_the_place_of_its_weights_is_refused(tmp_path):
    path = saved(tmp_path / "a", peft.LoraConfig(target_modules=LINEAR))
    (path / "adapter_model.safetensors").unlink()
    os.mkfifo(path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="is no regular file"):
        read_adapter(path)
