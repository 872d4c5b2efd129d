"""The peers' original scripts, run on an embedded pipeline, to check our copies of their procedures.

A script runs in a copy of its repository. Only its ties to Stable Diffusion, CUDA and the network are changed
(`Script.changes`): the model's id, the sizes of images, latents and text encoder, the device, bfloat16, which is slow on a
CPU, xformers and wandb.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import ModelMixin
from safetensors.torch import load_file

from esd_peft.models import ModelFamily

STEPS = 200  # as many as the rows of our copies take
# Counts samples through the denoiser as our runs do, a backward pass as two, and seeds the scripts' random draws.
COUNTER = """
import atexit, pathlib, random, torch
from diffusers import UNet2DConditionModel

random.seed({seed}), torch.manual_seed({seed}), torch.set_num_threads(1)
forward, samples = UNet2DConditionModel.forward, []


def counted(self, sample, *args, **kwargs):
    samples.append(len(sample) * (3 if torch.is_grad_enabled() else 1))
    return forward(self, sample, *args, **kwargs)


UNet2DConditionModel.forward = counted
atexit.register(lambda: pathlib.Path("nfe").write_text(str(sum(samples))))
"""


@dataclass(frozen=True)
class Script:
    """A peer's script: the replacements in its files, its arguments, and its output file."""

    changes: Callable[[ModelFamily, int], dict[str, dict[str, str]]]
    arguments: Callable[[ModelFamily, Path, str, float, int], list[str]]
    read: Callable[[ModelMixin, Path], None]

    def run(
        self, family: ModelFamily, concept: str, seed: int, folder: Path, checkout: Path, learning_rate: float
    ) -> tuple[ModelMixin, int]:
        """The denoiser of `family` that the script made, in `folder`, and its denoiser evaluations."""
        size = family.world.image_size  # type: ignore[union-attr]
        work = folder / checkout.name
        shutil.copytree(checkout, work, ignore=shutil.ignore_patterns(".git"))
        for name, changes in self.changes(family, size).items():
            text = (work / name).read_text()
            for old, new in changes.items():
                assert old in text, f"{name} of {checkout.name} no longer says {old}"
                text = text.replace(old, new)
            (work / name).write_text(text)
        (work / "sitecustomize.py").write_text(COUNTER.format(seed=seed))
        command = [sys.executable, *self.arguments(family, work, concept, learning_rate, size)]
        environment = os.environ | {"PYTHONPATH": str(work)}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        denoiser = family.load_denoiser(torch.float32)
        self.read(denoiser, work)
        return denoiser, int((work / "nfe").read_text())


def _authors_changes(family: ModelFamily, size: int) -> dict[str, dict[str, str]]:
    return {
        "esd_sd.py": {
            '"CompVis/stable-diffusion-v1-4"': repr(str(family.path)),
            "height=width=1024": f"height=width={size}",
            "torch.bfloat16": "torch.float32",
        }
    }


def _authors_arguments(family: ModelFamily, work: Path, concept: str, learning_rate: float, size: int) -> list[str]:
    options = {"erase_concept": concept, "train_method": "esd-x", "iterations": STEPS, "lr": learning_rate, "device": "cpu"}
    options["save_path"] = "made"
    return ["esd_sd.py", *(f"--{name}={value}" for name, value in options.items())]


def _read_weights(denoiser: ModelMixin, work: Path) -> None:
    """The layers that the authors' script saved, in place of the denoiser's."""
    (file,) = (work / "made").iterdir()
    unexpected = denoiser.load_state_dict(load_file(file), strict=False).unexpected_keys
    assert not unexpected, unexpected


def _leco_changes(family: ModelFamily, size: int) -> dict[str, dict[str, str]]:
    pipe = family.load_encoders(torch.device("cpu"), torch.float32)
    vae = family.load_part("vae").config
    return {
        "train_lora.py": {
            "import wandb\n": "",
            "cuda:0": "cpu",
            "    unet.enable_xformers_memory_efficient_attention()\n": "",
        },
        "train_util.py": {
            "UNET_IN_CHANNELS = 4": f"UNET_IN_CHANNELS = {vae.latent_channels}",
            "VAE_SCALE_FACTOR = 8": f"VAE_SCALE_FACTOR = {2 ** (len(vae.block_out_channels) - 1)}",
        },
        "model_util.py": {
            '"CompVis/stable-diffusion-v1-4"': repr(str(family.path)),
            "is not None else 12": f"is not None else {pipe.text_encoder.config.num_hidden_layers}",
        },
    }


def _leco_arguments(family: ModelFamily, work: Path, concept: str, learning_rate: float, size: int) -> list[str]:
    prompts = [{"target": concept, "guidance_scale": 1.0, "resolution": size, "batch_size": 1}]
    config = {
        "prompts_file": "prompts.yaml",
        "pretrained_model": {"name_or_path": str(family.path)},
        "network": {"type": "lierla", "rank": 4, "alpha": 1.0, "training_method": "full"},
        "train": {"precision": "float32", "iterations": STEPS, "lr": learning_rate, "optimizer": "AdamW"},
        "save": {"name": "made", "path": "made", "per_steps": STEPS, "precision": "float32"},
        "logging": {},
        "other": {},
    }
    (work / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    (work / "config.yaml").write_text(yaml.safe_dump(config))
    return ["train_lora.py", "--config_file=config.yaml"]


def _read_lora(denoiser: ModelMixin, work: Path) -> None:
    """The LoRA that LECO saved, merged into the denoiser."""
    saved = load_file(work / "made" / "made_last.safetensors")
    layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in denoiser.named_modules()}
    for name in {key.split(".")[0] for key in saved}:
        down, up = (saved[f"{name}.lora_{part}.weight"] for part in ("down", "up"))
        change = up.flatten(1) @ down.flatten(1) * saved[f"{name}.alpha"] / len(down)
        layers[name].weight.data += change.view_as(layers[name].weight)


PEERS = {
    "erasing": Script(_authors_changes, _authors_arguments, _read_weights),
    "LECO": Script(_leco_changes, _leco_arguments, _read_lora),
}
