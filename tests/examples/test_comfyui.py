"""The ComfyUI workflows are in its API format, their links fit, and they name the files that this package writes."""

import json
from pathlib import Path

import pytest

from esd_peft.adapters.export import KOHYA_FILE

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "examples" / "comfyui").glob("*.json"))
LINKED = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE"}  # the rest are values
# of ComfyUI's built-in nodes (its nodes.py) the inputs by type, and the types of the outputs in order
NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ["MODEL", "CLIP", "VAE"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": str, "strength_model": float}, ["MODEL"]),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ["LATENT"]),
    "KSampler": (
        {"model": "MODEL", "seed": int, "steps": int, "cfg": float, "sampler_name": str, "scheduler": str,
         "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT", "denoise": float},
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, []),
}  # fmt: skip


def read(name: str) -> dict:
    return json.loads((ROOT / "examples" / "comfyui" / f"{name}.json").read_text(encoding="utf-8"))


def values(workflow: dict, kind: str, name: str) -> set:
    return {node["inputs"][name] for node in workflow.values() if node["class_type"] == kind}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_input_has_a_value_or_a_link_of_its_type(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow.values():
        inputs, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == inputs.keys()
        for name, kind in inputs.items():
            value = node["inputs"][name]
            if kind in LINKED:
                source, output = value
                assert NODES[workflow[source]["class_type"]][1][output] == kind, name
            else:
                assert isinstance(value, kind), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_leads_to_an_image_that_is_saved(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    used = {value[0] for node in workflow.values() for value in node["inputs"].values() if isinstance(value, list)}
    unused = [node["class_type"] for number, node in workflow.items() if number not in used]
    assert set(unused) == {"SaveImage"}


def test_file_names_are_those_that_are_written():
    page = (ROOT / "docs" / "howto-hobbyist.md").read_text(encoding="utf-8")
    assert values(read("lora"), "LoraLoaderModelOnly", "lora_name") == {KOHYA_FILE}
    (merged,) = values(read("merged"), "CheckpointLoaderSimple", "ckpt_name")
    assert f"--output models/checkpoints/{merged}\n" in page


def test_the_lora_is_compared_with_the_base_on_the_same_noise():
    workflow = read("lora")
    samplers = [node["inputs"] for node in workflow.values() if node["class_type"] == "KSampler"]
    with_lora, without = ({k: v for k, v in inputs.items() if k != "model"} for inputs in samplers)
    assert with_lora == without
    assert values(workflow, "LoraLoaderModelOnly", "strength_model") == {1.0}
