"""Whatever stands in a file that a command reads: values, or one sentence; never another file, never much memory.

A few examples here; `tests/programs/fuzz.py` runs the same properties on ten thousand each.
"""

import contextlib
import json
import os
import resource
import shutil
import struct
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as NAME
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from esd_peft import EraseConfig, MergeConfig
from esd_peft.adapters.model_card import _evaluation, public_config
from esd_peft.adapters.saved import read_adapter
from esd_peft.attacks.prompts import Prompts
from esd_peft.errors import UserError
from esd_peft.evaluation.suites import load_suite, select_prompts
from esd_peft.io.tensors import open_tensors, read_tensors
from esd_peft.models import open_family
from esd_peft.models.parts import Part
from esd_peft.models.weight_files import needed_weights
from esd_peft.options.base import groups_of
from esd_peft.options.command_line import read_yaml
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.options.prompts import Concept
from esd_peft.training.checkpoint import Checkpoints

MEMORY = 512 * 2**20  # what a lie about sizes may cost at most, in bytes

# names that try to get out, numbers that libraries stumble over, what YAML makes of plain words
NAMES = st.sampled_from(
    ["../secret", "/etc/passwd", "..", ".", "", "a\0b", "a/b", "\ud800", "x" * 300, "secret", "unet", NAME]
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | NAMES
    | st.sampled_from([2**60, -1, 10**400, "circle", "LORA", "{0.__class__}", "{", "F32", "shapes", "<script>"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8) | NAMES, v, max_size=3)
)
YAML_WORDS = st.sampled_from(
    ["concept", "seed", "rank", "prompts", "circle", ": ", "\n", "  ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "<<",
     "? ", "!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!python/name:os.system ",
     "2001-13-40", "'", '"', "\\ud800", "0x", "0b_", "1:99", ".nan", "9" * 5000, "|", ">", "%YAML 9.9", "---",
     "\t", "\0", "é", "[" * 3000, "0x" + "f" * 5000]
)  # fmt: skip
SOUP = st.lists(YAML_WORDS, max_size=12).map("".join).map(lambda text: text.encode("utf-8"))


def maps(*keys):
    """Of the fields a reader looks for, and others, to anything."""
    return st.dictionaries(st.sampled_from(keys) | NAMES, VALUES, max_size=5)


def as_json(strategy):
    return strategy.map(lambda value: json.dumps(value).encode())


@st.composite
def damaged(draw, whole):
    """`whole` with bytes changed, cut off or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["change", "cut", "insert"])):
            case "change" if place < len(content):
                content[place] = draw(st.integers(0, 255))
            case "cut":
                del content[place:]
            case _:
                content[place:place] = draw(st.binary(max_size=9))
    return bytes(content)


@st.composite
def safetensors_files(draw):
    """Headers that say what is not so: lengths, dtypes, shapes and offsets."""
    sizes = st.sampled_from([0, 1, 4, 8, 2**31, 2**60, 2**63, 2**64 - 1, -1]) | st.integers(0, 100)
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "F99", ""]) | SCALARS,
            "shape": st.lists(sizes, max_size=3) | SCALARS,
            "data_offsets": st.lists(sizes, min_size=2, max_size=2) | SCALARS,
        },
    )
    header = json.dumps(
        draw(st.dictionaries(NAMES | st.sampled_from(["a.weight", "__metadata__"]), entry | VALUES, max_size=3))
    )
    length = draw(st.sampled_from([len(header), len(header) + 1, 0, 7, 2**31, 2**60, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + header.encode() + draw(st.binary(max_size=16))


class Bounds:
    """While a reader runs: no file outside its folder is opened to be read, none at all to be written, and memory ends."""

    watched: Path | None = None
    strayed: str | None = None

    def hook(self, event, values):
        if self.watched is None or event != "open" or not isinstance(values[0], str):
            return
        path, flags = os.path.realpath(values[0]), values[2]
        mine = Path(path).is_relative_to(self.watched) or path.startswith((sys.prefix, sys.base_prefix, "/proc/", str(HERE)))
        if flags & (os.O_WRONLY | os.O_RDWR) or not (mine or path.endswith(".py")):
            self.strayed = values[0]

    @contextlib.contextmanager
    def of(self, folder):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
        self.watched, self.strayed = folder.resolve(), None
        try:
            yield
        finally:
            self.watched = None
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert self.strayed is None, f"opened {self.strayed}"


HERE = Path(__file__).parents[2]
BOUNDS = Bounds()
sys.addaudithook(BOUNDS.hook)


def read(folder, reader):
    """The reader ends well or with one sentence, within its bounds."""
    with BOUNDS.of(folder):
        try:
            reader()
        except UserError as error:
            said = str(error)
            assert said and "\n" not in said and len(said) <= 2000
            said.encode()


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory, patched):
    """What may be read; beside it lies what may not."""
    root = tmp_path_factory.mktemp("fuzz")
    patched.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # some names look like the hub's
    (root / "secret").write_text("token")
    save_file({"a.weight": torch.zeros(1)}, root / NAME)
    (root / "in").mkdir()
    return root / "in"


# speed is not what is tested; all examples share a folder, and each writes its files anew
fuzzed = settings(deadline=None, suppress_health_check=list(HealthCheck))


CONFIGS = {"erase": EraseConfig, "merge": MergeConfig, "evaluate": EvaluateConfig}
GROUPS = groups_of(EraseConfig)
OPTIONS = sorted({*Concept.model_fields, *(name for group in GROUPS.values() for name in group.model_fields)})
FIELDS = sorted({*OPTIONS, *GROUPS, *MergeConfig.model_fields, *EvaluateConfig.model_fields})
GROUPED = st.dictionaries(st.sampled_from(sorted(GROUPS)), maps(*OPTIONS) | VALUES, max_size=3)


@fuzzed
@given(
    command=st.sampled_from(sorted(CONFIGS)),
    content=SOUP | as_json(maps(*FIELDS)) | as_json(GROUPED) | st.binary(max_size=200),
)
def test_config_yaml(folder, command, content):
    path = folder / "job.yaml"
    path.write_bytes(content)
    read(folder, lambda: CONFIGS[command](**read_yaml(path, CONFIGS[command])))


SUITE = (
    maps("about", "prompts", "role", "labels", "detector", "seeds", "template", "guidance_scale").map(
        lambda values: {"about": "x", "seeds": 1, "prompts": {"template": "a {shape}", "shape": ["circle"]}} | values
    )
    | st.sampled_from(["{shape:>99999999999}", "{shape.__class__}", "{shape!r}", "{}", "{", "x"]).map(
        lambda template: {"about": "x", "seeds": 1, "prompts": {"template": template, "shape": ["circle"]}}
    )
    | st.dictionaries(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=3), max_size=3).map(
        lambda said: {"about": "x", "seeds": 1, "prompts": {"template": "a {shape}", "shape": said}}
    )
)


@fuzzed
@given(content=SOUP | as_json(SUITE) | st.binary(max_size=200))
def test_suite_yaml(folder, content):
    path = folder / "suite.yaml"
    path.write_bytes(content)

    def reader():
        suite = load_suite(str(path))
        if suite.prompts != "file":
            select_prompts(suite, ["circle"], None, 2)

    read(folder, reader)


CSV = st.lists(
    st.sampled_from(["prompt", "artist", "a circle", ",", ";", '"', "\n", "\r", "\r\n", "\0", "﻿", "é", "x" * 140_000]),
    max_size=16,
).map(lambda parts: "".join(parts).encode())


@fuzzed
@given(
    suite=st.sampled_from(["csv", "i2p", "coco"]),
    content=CSV | CSV.map(b"prompt,artist\n".__add__) | st.binary(max_size=200),
)
def test_prompts_csv(folder, suite, content):
    path = folder / "prompts.csv"
    path.write_bytes(content)
    read(folder, lambda: select_prompts(load_suite(suite), ["circle"], str(path), 2))


@fuzzed
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_prompt_file(folder, content):
    path = folder / "prompts.txt"
    path.write_bytes(content)
    read(folder, lambda: Prompts(path))


LORA = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["to_k"]}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
BASE = {"model": "shapes", "class": "StableDiffusionPipeline", "denoiser_sha256": {}}
LORA_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules", "use_dora", "megatron_config", "megatron_core",
               "auto_mapping", "rank_pattern", "alpha_pattern", "layers_to_transform", "task_type",
               "init_lora_weights", "bias")  # fmt: skip
ADAPTER_FILES = {
    "adapter_config.json": as_json(maps(*LORA_FIELDS).map(LORA.__or__) | VALUES),
    "base.json": as_json(
        maps("model", "class", "files", "revision", "variant", "denoiser_sha256", "checkpoint_config").map(BASE.__or__)
        | VALUES
    ),
    "config.yaml": SOUP | as_json(GROUPED),
    "result.json": as_json(maps("concepts", "others")),
    "adapter_model.safetensors": safetensors_files(),
    "denoiser_weights.safetensors": safetensors_files(),
}


@pytest.fixture(scope="module")
def adapter(folder, small_sd):
    """The files of an adapter, which each example writes anew, and the denoiser it fits."""
    denoiser = open_family(str(small_sd)).empty_denoiser()
    width = denoiser.get_submodule(LAYER).weight.shape
    whole = folder.parent / "whole.safetensors"
    names = {"lora_A": (1, width[1]), "lora_B": (width[0], 1)}
    save_file({f"base_model.model.{LAYER}.{n}.weight": torch.ones(shape) for n, shape in names.items()}, whole)
    files = {
        "adapter_config.json": json.dumps(LORA).encode(),
        "base.json": json.dumps(BASE).encode(),
        "config.yaml": EraseConfig(concept="circle").to_yaml().encode(),
        "adapter_model.safetensors": whole.read_bytes(),
    }
    return files, denoiser


@fuzzed
@given(name=st.sampled_from(sorted(ADAPTER_FILES)), data=st.data())
def test_adapter(folder, adapter, name, data):
    files, denoiser = adapter
    whole = files.get(name, files["adapter_model.safetensors"] if name.endswith("safetensors") else b"{}")
    content = data.draw(ADAPTER_FILES[name] | damaged(whole) | st.binary(max_size=100))
    path = fresh(folder / "adapter")
    for file, known in {**files, name: content}.items():
        (path / file).write_bytes(known)

    def reader():
        found = read_adapter(path)
        assert isinstance(found.concepts, list) and isinstance(found.scope, str)
        public_config(found.config)
        _evaluation(found.result)
        open_family(found.base.get("model", "shapes"))
        for weight, change in found.changes(denoiser).items():
            change.on(torch.zeros(denoiser.get_parameter(weight).shape)).merge()

    read(folder, reader)


@fuzzed
@given(content=safetensors_files() | st.binary(max_size=100))
def test_safetensors(folder, content):
    path = folder / "some.safetensors"
    path.write_bytes(content)

    def stream():
        tensors = open_tensors(path)
        with path.open("rb") as file:
            for name in tensors.entries:
                tensors.read(file, name)

    read(folder, lambda: read_tensors(path))
    read(folder, stream)


@fuzzed
@given(
    content=as_json(st.dictionaries(NAMES, NAMES | SCALARS, max_size=3).map(lambda shards: {"weight_map": shards}) | VALUES)
    | st.binary(max_size=100)
)
def test_sharded_index(folder, content):
    path = fresh(folder / "shards")
    (path / f"{NAME}.index.json").write_bytes(content)

    def reader():
        for file in needed_weights(path, "diffusers").files:
            assert file.resolve().parent == path.resolve()

    read(folder, reader)


@pytest.fixture(scope="module")
def model(folder, small_sd):
    return shutil.copytree(small_sd, folder / "model")


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "_class_name")
PART = st.lists(
    st.sampled_from(["diffusers", "transformers", "os", "system", "UNet2DConditionModel", "pipeline"]) | SCALARS, max_size=3
)


@fuzzed
@given(data=st.data())
def test_model_index(folder, model, small_sd, data):
    whole = (small_sd / "model_index.json").read_bytes()
    changed = st.dictionaries(st.sampled_from(PARTS) | NAMES, PART | VALUES, max_size=2).map(json.loads(whole).__or__)
    (model / "model_index.json").write_bytes(data.draw(as_json(changed | VALUES) | damaged(whole)))
    before = {*sys.modules}
    read(folder, lambda: open_family(str(model)).empty_denoiser())
    strange = {name.partition(".")[0] for name in {*sys.modules} - before} - {"diffusers", "transformers"}
    assert not strange, f"imported {strange}"


@fuzzed
@given(data=st.data())
def test_model_config(folder, model, small_sd, data):
    shutil.copyfile(small_sd / "model_index.json", model / "model_index.json")
    path = model / "unet" / "config.json"
    whole = (small_sd / "unet" / "config.json").read_bytes()
    fields = st.sampled_from(sorted(json.loads(whole)))
    changed = st.dictionaries(fields, SCALARS, max_size=2).map(json.loads(whole).__or__)
    path.write_bytes(data.draw(as_json(changed | VALUES) | damaged(whole)))
    part = Part(model, "unet", ["diffusers", "UNet2DConditionModel"], "--model")
    read(folder, lambda: (part.check_config(), part.check_weights(merged=True)))


@pytest.fixture(scope="module")
def checkpoint(folder):
    """A checkpoint as a run leaves it: its config, and its state's bytes."""
    config = EraseConfig(concept="circle", output=folder / "out", overwrite=True)
    checkpoints = Checkpoints(config.checkpoint, config.flat(), {"unet": "0"})
    state = {"weights": {1: torch.ones(2)}, "seed": 4, "source": {"before": torch.ones(2)}}
    checkpoints.save(3, state, {"inputs": torch.ones(2)})
    return config.replace(overwrite=False, resume=True), (checkpoints.folder / "step-00000003.safetensors")


def sealed(path, values):
    """A checkpoint of those values whose hash is right."""
    from esd_peft.training.checkpoint import _digest

    text = json.dumps(values)
    save_file({"00000": torch.ones(2)}, path, {"values": text, "sha256": _digest({"00000": torch.ones(2)}, text)})
    return path.read_bytes()


@fuzzed
@given(data=st.data())
def test_checkpoint(folder, checkpoint, data):
    config, path = checkpoint
    checkpoints = Checkpoints(config.checkpoint, config.flat(), {"unet": "0"})
    good = {
        "config": checkpoints.config,
        "base": {"unet": "0"},
        "buffer": None,
        "made_with": {},
        "state": {"pairs": [["source", {"tensor": "00000"}]]},
    }
    values = maps("config", "base", "buffer", "made_with", "state", "pairs", "tensor").map(good.__or__) | VALUES
    whole = sealed(folder / "sealed.safetensors", good)
    forged = values.map(lambda v: sealed(folder / "sealed.safetensors", v))
    content = data.draw(forged | damaged(whole) | safetensors_files())
    path.write_bytes(content)
    read(folder, checkpoints.load)


def fresh(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path
