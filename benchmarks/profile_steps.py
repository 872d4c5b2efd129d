"""Costs of a rollout step and of a training iteration by kind of operation, at real model sizes.

    python benchmarks/profile_steps.py --output benchmarks/results/profile_counts.json

Counts, on any machine: the real architectures run on tensors without data, and the calls, FLOPs and bytes read and written
of all operations are added up by kind. `share` is each kind's share of the time if every operation took what its FLOPs or
its bytes take at the least, at --flops and --bandwidth: assumptions (an H100's data sheet unless given), not measurements.
`outside` leaves out convolutions, matrix products and attention, which no kernel of ours would replace. With a GPU the time
is also measured, with torch.profiler.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import peft
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from esd_kernels import guided_mse
from esd_peft.training.student import compute_in_inputs_dtype
from real_models import UNETS

BATCH = 4  # trajectories, or training samples
RANK = 8
FLOPS, BANDWIDTH = 989e12, 3.35e12  # an H100's data sheet: bf16 without sparsity, and HBM3
FLOAT32 = 67 / 989  # of that, in float32 without TF32, as PyTorch multiplies by default
MODELS = {name: UNETS[name] for name in ("SD 1.5", "SDXL")}
KINDS = {  # by the first part that matches the operation's name
    "our kernel": ("guided_mse",),
    "optimizer": ("adamw", "_foreach"),
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "convolution": ("conv",),
    "matrix product": ("mm", "linear"),
    "GroupNorm": ("group_norm",),
    "LayerNorm": ("layer_norm",),
    "SiLU": ("silu",),
    "GELU": ("gelu",),
    "copies": ("copy", "clone", "cat", "upsample", "pad", "fill", "zero", "Memcpy", "Memset"),
}
EVERYTHING = r".*(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|proj_(in|out)|conv\d?|conv_(in|out|shortcut)|\w*emb_proj|linear_\d)"
ADAPTED = r".*attn2\.to_[kv]"  # the default scope
FIRST_ADAPTED = r"down_blocks\.[01]\.attentions\.0\.transformer_blocks\.0\.attn2\.to_[kv]"
COUNTED = ("calls", "flops", "read", "written", "seconds")
LARGE = ("convolution", "matrix product", "attention")
Step = Callable[[], Any]


def kind_of(name: str) -> str:
    """The kind of an operation named like `aten.convolution.default` or `aten::convolution`."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other elementwise")


class Count(TorchDispatchMode):
    """Adds up calls, FLOPs and bytes by kind, and each operation's least time."""

    def __init__(self, flops: float, bandwidth: float) -> None:
        super().__init__()
        self.peak, self.bandwidth = flops, bandwidth
        self.found: dict[str, dict[str, float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim" or func.is_view or any(word in func.__name__ for word in ("view", "empty", "detach")):
            return out  # nothing moves
        read = sum(_bytes(x) for x in {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}.values())
        written = sum(_bytes(x) for x in tree_leaves(out) if isinstance(x, Tensor))
        flops = _flops(func, args, kwargs or {}, out)
        row = self.found.setdefault(kind_of(str(func)), dict.fromkeys(COUNTED, 0.0))
        peak = self.peak * (FLOAT32 if getattr(out, "dtype", None) == torch.float32 else 1)
        seconds = max(flops / peak, (read + written) / self.bandwidth)
        for key, value in zip(COUNTED, (1, flops, read, written, seconds), strict=True):
            row[key] += value
        return out

    def total(self) -> dict[str, float]:
        """Calls, FLOPs, bytes and seconds of all kinds together."""
        return {key: sum(row[key] for row in self.found.values()) for key in COUNTED}

    def table(self) -> dict[str, dict[str, float]]:
        """`{kind: figures}`, the largest share first."""
        rows = sorted(self.found.items(), key=lambda item: -item[1]["seconds"])
        total = sum(row["seconds"] for _, row in rows)
        small = sum(row["seconds"] for kind, row in rows if kind not in LARGE)
        return {
            kind: {
                "calls": int(row["calls"]),
                "gflop": round(row["flops"] / 1e9, 1),
                "mib_read": round(row["read"] / 2**20, 1),
                "mib_written": round(row["written"] / 2**20, 1),
                "share": round(row["seconds"] / total, 4),
                "outside": None if kind in LARGE else round(row["seconds"] / small, 4),
            }
            for kind, row in rows
        }


def _bytes(x: Tensor) -> int:
    """Return the bytes of its memory: expanded dimensions are read once."""
    return x.itemsize * min(x.numel(), x.untyped_storage().nbytes() // x.itemsize)


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> float:
    name = func.__name__
    if "scaled_dot_product" in name:  # two products, and with the scores made again five in the backward pass
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        return (10 if backward else 4) * query.numel() * key.shape[-2]
    formula = flop_registry.get(func.overloadpacket)
    return float(formula(*args, **kwargs, out_val=out)) if formula else 0.0


class NormsInFloat32(TorchFunctionMode):
    """Emulates the GPU autocast of normalisation layers, which a CPU lacks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.functional.group_norm, nn.functional.layer_norm):
            args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


class NormsCopied(TorchFunctionMode):
    """Emulates the copies of PyTorch's GPU GroupNorm in channels_last, which supports only the other layout."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not nn.functional.group_norm:
            return func(*args, **(kwargs or {}))
        return func(args[0].clone(), *args[1:], **(kwargs or {})).clone()  # to that layout and back


def architecture(name: str, targets: str = ADAPTED, cast_activations: bool = False) -> nn.Module:
    """The UNet in bf16 with a LoRA on the default scope, on the meta device; as peft has it, or as `esd_peft` trains it."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    with torch.device("meta"):
        unet = peft.get_peft_model(UNet2DConditionModel(**MODELS[name]).to(torch.bfloat16).requires_grad_(False), config)
    if not cast_activations:
        compute_in_inputs_dtype(unet)
    return unet


def fill(unet: nn.Module, device: str) -> tuple[dict[str, Any], Tensor]:
    """Random weights for `unet`; prompt arguments for 2 · BATCH samples, and latents."""
    for module in unet.modules():
        for key, p in module._parameters.items():
            if p is not None:
                weights = torch.randn(p.shape, dtype=p.dtype, device=device) * 0.02
                module._parameters[key] = nn.Parameter(weights, requires_grad=p.requires_grad)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    draw = {"dtype": torch.bfloat16, "device": device}
    prompt: dict[str, Any] = {"encoder_hidden_states": torch.randn(2 * BATCH, 77, width, **draw)}
    if unet.config.addition_embed_type:
        pooled, sizes = torch.randn(2 * BATCH, 1280, **draw), torch.zeros(2 * BATCH, 6, device=device)
        prompt["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return prompt, torch.randn(BATCH, 4, size, size, device=device)


def forward(unet: nn.Module, prompt: dict[str, Any], latents: Tensor, autocast: bool) -> Step:
    """The teacher's predictions for classifier-free guidance, as one batch."""
    times = torch.full((2 * BATCH,), 500, device=latents.device)

    @torch.no_grad()
    def run() -> Tensor:
        with unet.disable_adapter(), torch.autocast(latents.device.type, torch.bfloat16, enabled=autocast):
            return unet(latents.to(torch.bfloat16).repeat(2, 1, 1, 1), times, **prompt).sample

    return run


def rollout_step(unet: nn.Module, prompt: dict[str, Any], latents: Tensor, autocast: bool) -> Step:
    """Predictions, guidance, and DDIM's update from ᾱ = 0.5 to 0.6."""
    predict = forward(unet, prompt, latents, autocast)

    def run() -> None:
        null, concept = predict().float().chunk(2)
        noise = null + 3 * (concept - null)
        0.6**0.5 * ((latents - 0.5**0.5 * noise) / 0.5**0.5) + 0.4**0.5 * noise

    return run


def training_step(unet: nn.Module, prompt: dict[str, Any], latents: Tensor, autocast: bool) -> Step:
    """Prediction, loss, backward pass and update, as in `esd_peft.training.trainer`."""
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    times = torch.full((BATCH,), 500, device=latents.device)
    teacher = torch.randn(2 * BATCH, *latents.shape[1:], device=latents.device, dtype=torch.bfloat16)
    eta = torch.ones(BATCH, device=latents.device)
    half = {key: _first_half(value) for key, value in prompt.items()}

    def run() -> None:
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=autocast):
            prediction = unet(latents.to(torch.bfloat16), times, **half).sample
        loss = guided_mse(prediction, teacher, eta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return run


def _first_half(value: Any) -> Any:
    return {k: _first_half(v) for k, v in value.items()} if isinstance(value, dict) else value[:BATCH]


STEPS = {"rollout step": rollout_step, "training iteration": training_step}


def count(
    model: str,
    make: Callable[..., Step],
    peaks: tuple[float, float],
    autocast: bool = False,
    copied: bool = False,
    **adapter: Any,
) -> Count:
    """One step of a model without data, at the `peaks` FLOP/s and bytes/s."""
    unet = architecture(model, **adapter)
    norms = NormsInFloat32() if autocast else NormsCopied() if copied else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = make(unet, *fill(unet, "cpu"), autocast)
        with Count(*peaks) as counted, norms:
            step()
    return counted


def counts(model: str, peaks: tuple[float, float]) -> dict[str, Any]:
    """Both steps by kind; and the share of a step that is in a part of it: what would be left out without it."""
    steps = {name: count(model, make, peaks) for name, make in STEPS.items()}
    rollout, training = (counted.total() for counted in steps.values())
    parts = {
        "guidance and scheduler, of a rollout step": (rollout, count(model, forward, peaks).total()),
        "all but the first LoRAs, of a training iteration": (
            training,
            count(model, training_step, peaks, targets=FIRST_ADAPTED).total(),
        ),
        "autocast, of a rollout step under it": (count(model, rollout_step, peaks, autocast=True).total(), rollout),
        "autocast, of a training iteration under it": (count(model, training_step, peaks, autocast=True).total(), training),
        "copies around GroupNorm, of a rollout step in channels_last": (
            count(model, rollout_step, peaks, copied=True).total(),
            rollout,
        ),
        "copies around GroupNorm, of a training iteration in channels_last": (
            count(model, training_step, peaks, copied=True).total(),
            training,
        ),
        "activations cast for adapters, of a training iteration where all layers learn": (
            count(model, training_step, peaks, targets=EVERYTHING, cast_activations=True).total(),
            count(model, training_step, peaks, targets=EVERYTHING).total(),
        ),
    }
    shares = {
        part: {key: round(1 - less[key] / whole[key], 4) for key in ("calls", "flops", "seconds")}
        for part, (whole, less) in parts.items()
    }
    return {
        "steps": {name: {"total": counted.total(), "kinds": counted.table()} for name, counted in steps.items()},
        "parts": shares,
    }


def profile(model: str, repeats: int = 5) -> dict[str, Any]:
    """Milliseconds by kind of operation, and their sum, of one run of each step on the GPU."""
    unet = architecture(model)
    prompt, latents = fill(unet, "cuda")
    unet.to(memory_format=torch.channels_last)
    found = {}
    for name, make in STEPS.items():
        step = make(unet, prompt, latents, False)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as measured:
            for _ in range(repeats):
                step()
            torch.cuda.synchronize()
        kinds: dict[str, float] = {}
        for event in measured.key_averages():
            if event.device_type == torch.autograd.DeviceType.CPU and event.self_device_time_total:
                kind = kind_of(event.key)
                kinds[kind] = kinds.get(kind, 0.0) + event.self_device_time_total / 1e3 / repeats
        found[name] = {"ms": dict(sorted(kinds.items(), key=lambda item: -item[1])), "sum_ms": sum(kinds.values())}
    return found


def profile_steps(flops: float = FLOPS, bandwidth: float = BANDWIDTH) -> dict[str, Any]:
    """Return the results of the command."""
    result: dict[str, Any] = {
        "assumptions": {"flops": flops, "bandwidth": bandwidth, "batch": BATCH, "dtype": "bfloat16", "rank": RANK},
        "counts": {model: counts(model, (flops, bandwidth)) for model in MODELS},
    }
    if torch.cuda.is_available():
        result["measured"] = {model: profile(model) for model in MODELS}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--flops", type=float, default=FLOPS, help="peak bf16 FLOP/s")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="peak bytes/s")
    args = parser.parse_args()
    result = profile_steps(args.flops, args.bandwidth)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for model, found in result["counts"].items():
        for step, counted in found["steps"].items():
            shares = ", ".join(f"{kind} {row['share']:.1%}" for kind, row in counted["kinds"].items())
            print(f"{model}, {step}, {counted['total']['calls']:.0f} calls: {shares}")


if __name__ == "__main__":
    main()
