"""Speed and memory of a merge: a sharded model with random weights on this disk.

    python benchmarks/merge_speed.py --gib 12 --width 320 --output benchmarks/results/merge_speed.json

Copies the model first, to know what the disk reads and writes, then merges a random LoRA into it with the defaults
(which verify every merged layer). Both start from a cold page cache and end with everything on the disk. Needs about
twice the model's size of free space. The default is a small model, to try the script.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from esd_peft import MergeConfig, merge_adapter
from esd_peft.io.tensors import NewTensor, as_bytes, write_tensors
from esd_peft.models import open_family
from esd_peft.worlds import WORLDS

GIB = 2**30
LIMIT = 2 * GIB  # above the largest shard
TOKEN_WIDTH = 2048  # Stable Diffusion XL's
RANDOM = 2**26  # numbers drawn; tensors are cut from them


def make_model(path: Path, gib: float, width: int, shard_gib: float) -> list[Path]:
    """A Stable Diffusion directory whose UNet has about `gib` GiB of random fp16 weights; returns its shards."""
    shutil.copytree(WORLDS["shapes"].pipeline, path)
    _widen_text_encoder(path / "text_encoder")
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    small, larger = (_bytes(_unet(width, layers)) for layers in (1, 2))
    unet = _unet(width, max(1, 1 + round((gib * GIB - small) / (larger - small))))
    unet.save_config(path / "unet")
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    for name, value in unet.state_dict().items():
        if sum(2 * v.numel() for _, v in [*shards[-1], (name, value)]) > shard_gib * GIB:
            shards.append([])
        shards[-1].append((name, value))
    numbers = 0.02 * torch.randn(RANDOM, generator=torch.Generator().manual_seed(0)).half()
    files, weight_map = [], {}
    for i, shard in enumerate(shards, 1):
        files.append(path / "unet" / f"diffusion_pytorch_model-{i:05}-of-{len(shards):05}.safetensors")
        new = [NewTensor(n, "F16", [*v.shape], 2 * v.numel(), partial(_cut, numbers, v.numel())) for n, v in shard]
        write_tensors(files[-1], new, {})
        weight_map |= {name: files[-1].name for name, _ in shard}
    index = {"metadata": {"total_size": _bytes(unet)}, "weight_map": weight_map}
    (path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return files


def _widen_text_encoder(folder: Path) -> None:
    """One layer of the width that the UNet reads: without it the model does not pass the dry run of a merge."""
    config = CLIPTextConfig.from_pretrained(folder)
    config.update({"hidden_size": TOKEN_WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16})
    CLIPTextModel(config).half().save_pretrained(folder)


def _cut(numbers: torch.Tensor, count: int) -> bytes:
    return as_bytes(numbers[:count] if count <= RANDOM else numbers.repeat(1 + count // RANDOM)[:count])


def _unet(width: int, layers: int) -> UNet2DConditionModel:
    """Shaped like Stable Diffusion XL's (whose width is 320), with as many transformer layers as it takes."""
    channels = AutoencoderKL.load_config(WORLDS["shapes"].pipeline / "vae")["latent_channels"]  # which this decodes
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=32,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width, 4 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, layers),
            attention_head_dim=8,
            cross_attention_dim=TOKEN_WIDTH,
            use_linear_projection=True,
        )


def _bytes(unet: UNet2DConditionModel) -> int:
    return sum(2 * value.numel() for value in unet.state_dict().values())


def make_adapter(path: Path, model: Path, scope: str, rank: int) -> int:
    """A random LoRA of that scope; returns how many layers it changes."""
    family = open_family(str(model))
    denoiser = family.empty_denoiser()
    names = family.scope_modules(denoiser, scope)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in names:
        inner, kernel = denoiser.get_submodule(name).weight.shape[1], denoiser.get_submodule(name).weight.shape[2:]
        outer = denoiser.get_submodule(name).weight.shape[0]
        down = torch.randn(rank, inner, *kernel, generator=generator) / math.sqrt(inner)
        up = 0.01 * torch.randn(outer, rank, *[1] * len(kernel), generator=generator)
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names).save_pretrained(path)
    save_file(tensors, path / peft.utils.SAFETENSORS_WEIGHTS_NAME)
    return len(names)


def on_disk(folder: Path) -> None:
    """Write out what the page cache holds of `folder`, and forget it there."""
    for file in (p for p in folder.rglob("*") if p.is_file()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(model: Path, target: Path) -> float:
    """A plain copy of the model, read from the disk and written to it."""
    on_disk(model)
    start = time.perf_counter()
    shutil.copytree(model, target, copy_function=shutil.copyfile)
    on_disk(target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def merge_seconds(model: Path, adapter: Path, target: Path) -> tuple[float, int, dict[str, Any]]:
    """Merge in a separate process; return seconds, its peak resident bytes, and its record."""
    on_disk(model)
    start = time.perf_counter()
    record = merge_adapter(MergeConfig(adapter=adapter, base=str(model), output=target))
    on_disk(target)
    return time.perf_counter() - start, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--gib", type=float, default=0.1, help="size of the model")
    parser.add_argument("--width", type=int, default=64, help="channels of the first block; 320 is Stable Diffusion XL's")
    parser.add_argument("--shard-gib", type=float, default=2)
    parser.add_argument("--scope", default="esd-x-strict")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="copies and merges, in turn; the medians count")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; left out: the system's temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, adapter = Path(folder) / "model", Path(folder) / "adapter"
        shards = make_model(model, args.gib, args.width, args.shard_gib)
        layers = make_adapter(adapter, model, args.scope, args.rank)
        size = sum(file.stat().st_size for file in model.rglob("*") if file.is_file())
        copies, merges, peaks = [], [], []
        for _ in range(args.repeats):
            copies.append(copy_seconds(model, Path(folder) / "copy"))
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                seconds, peak, record = pool.submit(merge_seconds, model, adapter, Path(folder) / "merged").result()
            merges.append(seconds)
            peaks.append(peak)
            shutil.rmtree(Path(folder) / "merged")
        largest = max(file.stat().st_size for file in shards)
    copied, merged = (sorted(values)[len(values) // 2] for values in (copies, merges))
    result = {
        "command": " ".join(["python", "benchmarks/merge_speed.py", *sys.argv[1:]]),
        "model_gib": size / GIB,
        "shards": len(shards),
        "largest_shard_gib": largest / GIB,
        "merged_tensors": record["merged_tensors"],
        "layers": layers,
        "verification": record["verification"],
        "copy_seconds": copies,
        "merge_seconds": merges,
        "copy_gib_per_second": size / GIB / copied,
        "merge_gib_per_second": size / GIB / merged,
        "share_of_copy_rate": copied / merged,
        "peak_gib": max(peaks) / GIB,
        "peak_above_largest_shard_gib": (max(peaks) - largest) / GIB,
        "machine": {
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[1],  # other load at the same time
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    print(f"memory: {'met' if max(peaks) < largest + LIMIT else 'MISSED'}: {max(peaks) / GIB:.2f} GiB at the peak")
    print(f"speed: {'met' if copied >= 0.6 * merged else 'MISSED'}: {copied / merged:.0%} of the rate of a copy")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
