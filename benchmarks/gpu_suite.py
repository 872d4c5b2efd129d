"""Every GPU check and benchmark of the project, in one command.

    python benchmarks/gpu_suite.py --output benchmarks/results

Writes OUTPUT/<device>/<section>.json, and OUTPUT/<device>/summary.md with the driver and library versions. Needs no
network and no weights: models are built at their real size with random ones. Sections that need a GPU, or more of its
memory than there is, are skipped and say so.

All of it is meant to stay below 8 minutes on a data-centre GPU, a budget which no run has confirmed yet, in seconds:
correctness 10, timings 60, synchronisation 10, profile 50, steps 120 (of which compiling 80), erasure 100, memory 130 (most
of it for writing and reading FLUX.1).
"""

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import kernel_timings
import peft
import profile_steps
from diffusers import DDIMScheduler
from erasure import PROCEDURES
from real_models import make_model

from esd_kernels import guided_mse
from esd_peft import EraseConfig, erase
from esd_peft.adapters import Student, make_student, scope_modules
from esd_peft.backbones import open_backbone
from esd_peft.compilation import compiled
from esd_peft.concepts import plan_prompts
from esd_peft.devices import place, resolve_device, resolve_dtype
from esd_peft.distill import distill
from esd_peft.objectives import GuidedTarget
from esd_peft.phases import Costs
from esd_peft.plan import describe, make_plan
from esd_peft.rollout import Rollout, make_table

GIB = 2**30
BATCH = 4  # of the step timings
GOALS = {"SD 1.5": 4, "SD 2.1": 6, "SDXL": 8, "FLUX.1": 11}  # GiB, of a 12 GB card
PEER_STEPS = 5  # of the authors' procedure, which are enough for its time a training tuple


_models = tempfile.TemporaryDirectory()


class Skip(Exception):
    """Why a section did not run."""


def needs_gpu(gib: float = 0) -> torch.device:
    """The GPU, if it has that much memory. Raises `Skip`."""
    if not torch.cuda.is_available():
        raise Skip("no GPU")
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if total < gib:
        raise Skip(f"needs {gib} GiB of GPU memory, there are {total:.0f}")
    return torch.device("cuda")


def environment() -> dict:
    """What the figures belong to."""
    found = {name: version(name) for name in ("torch", "triton", "diffusers", "peft", "bitsandbytes")}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {"driver": subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]}
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def correctness() -> dict:
    """The kernel against the formula in fp64: fresh inputs, odd sizes, layouts, and memory full of NaN to start with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = int(time.time())
    generator = torch.Generator(device).manual_seed(seed)
    worst: dict[str, dict[str, float]] = {}
    for name, dtype in kernel_timings.DTYPES.items():
        for shape in ((1, 1), (3, 41, 5), (7, 4, 64, 64), (2, 16, 5, 13, 17), (65, 4, 33, 31)):
            draw = {"generator": generator, "device": device}
            student = torch.randn(*shape, **draw).to(dtype)
            if len(shape) == 4:
                student = student.contiguous(memory_format=torch.channels_last)
            student.requires_grad_()
            teacher = torch.randn(2 * shape[0], *shape[1:], **draw).to(dtype)
            eta = torch.rand(shape[0], **draw) * 3
            poison = torch.full((8 * student.numel(),), torch.nan, device=device)
            del poison  # what the allocator hands out next holds NaN
            loss = guided_mse(student, teacher, eta)
            (grad,) = torch.autograd.grad(loss, student)
            null, concept = teacher.double().chunk(2)
            column = eta.double().view(-1, *[1] * (len(shape) - 1))
            error = student.detach().double() - (null - column * (concept - null))
            expected, slope = error.square().mean(), 2 * error / error.numel()
            found = {
                "loss": ((loss.double() - expected).abs() / expected).item(),
                "gradient": ((grad.double() - slope).abs().max() / slope.abs().max()).item(),
            }
            worst[name] = {key: max(value, worst.get(name, {}).get(key, 0.0)) for key, value in found.items()}
    allowed = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 1.2e-2}  # the interpreter truncates where a GPU rounds
    wrong = [name for name, found in worst.items() if not max(found.values()) <= allowed[name]]
    if wrong:
        raise AssertionError(f"guided_mse is wrong in {', '.join(wrong)}: {worst}")
    return {"seed": seed, "device": device, "worst_relative_error": worst}


def timings() -> dict:
    """`benchmarks/kernel_timings.py` at a few sizes; the whole of it takes longer."""
    needs_gpu()
    shapes, batches, dtypes = ["SD 512", "video 480p"], [4, 64], ["bf16", "fp32"]
    return {"rows": kernel_timings.benchmark(shapes, batches, dtypes)}


def steps() -> dict:
    """A rollout step and a training step of SD 1.5 at 512², eager and compiled, against plain diffusers and peft."""
    device = needs_gpu(20)
    options = {"trajectories": BATCH, "num_inference_steps": 20, "train_batch_size": BATCH, "max_train_steps": 40}
    options["learning_rate"] = 1e-4  # random weights
    ours = {how: _our_steps(str(model("SD 1.5")), options | {"compile": how}) for how in ("off", "on")}
    plain = _plain_steps(model("SD 1.5"), device)
    faster = {how: {key: plain[key] / found[key] for key in found} for how, found in ours.items()}
    return {"ours, by --compile": ours, "plain": plain, "times_as_fast, by --compile": faster}


def _our_steps(path: str | None, options: dict) -> dict[str, float]:
    """Seconds of the two steps in our loops, after a whole run that compiles and chooses algorithms."""
    student, objective = _job(path, options)
    rollout = objective.rollout
    with compiled(rollout.denoiser, objective):
        distill(student, objective, torch.Generator())
        rollout.costs = Costs(rollout.device)
        with rollout.costs.phase("distill"):
            distill(student, objective, torch.Generator())
    seconds, config = rollout.costs.seconds, rollout.config
    return {
        "rollout_step_s": seconds["rollout"] / rollout.num_inference_steps,
        "training_step_s": seconds["distill"] / (config.max_train_steps or objective.steps),
    }


def _job(path: str | None, options: dict) -> tuple[Student, GuidedTarget]:
    """What `esd_peft.erase` trains and on what, ready to start."""
    config = EraseConfig(concept="circle", model=path, **options)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    backbone, plan = open_backbone(path), plan_prompts(config)
    table = make_table(plan, backbone.encode(plan.texts, device, dtype))
    denoiser = backbone.load_denoiser(dtype)
    place(denoiser, device)
    student = make_student(backbone, denoiser, config)
    rollout = Rollout(backbone, denoiser, table, student.teacher, config, device, dtype, Costs(device))
    return student, GuidedTarget(rollout)


def synchronisation() -> dict:
    """Rollouts and training with every wait of the host for the GPU an error, but for the readings of the loss."""
    needs_gpu()
    found = {}
    for name, options in {"teacher": {}, "student": {"rollout": "student", "refill_every": 10}}.items():
        for dtype in ("bfloat16", "float16"):
            student, objective = _job(None, options | {"dtype": dtype, "snr_gamma": 5.0, "learning_rate": 1e-4})
            distill(student, objective, torch.Generator())  # the first run compiles the kernel and chooses algorithms
            with Readings() as seen:
                losses = distill(student, objective, torch.Generator())
            if seen.count != len(losses):
                raise AssertionError(f"{name}, {dtype}: {seen.count} readings from the GPU for {len(losses)} losses")
            found[f"{name}, {dtype}"] = {"steps": objective.steps, "readings": seen.count}
    return found


class Readings:
    """Within it the host may wait for the GPU in calls of `.item()` alone, which are counted."""

    def __enter__(self) -> "Readings":
        self.count, self._item = 0, torch.Tensor.item

        def item(tensor: torch.Tensor) -> float:
            if not tensor.is_cuda:
                return self._item(tensor)
            self.count += 1
            torch.cuda.set_sync_debug_mode("default")
            value = self._item(tensor)
            torch.cuda.set_sync_debug_mode("error")
            return value

        torch.Tensor.item = item
        torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.Tensor.item = self._item


def profile() -> dict:
    """`benchmarks/profile_steps.py`: counts and measured times by kind of operation, SD 1.5 and SDXL."""
    needs_gpu(70)  # the activations of four SDXL samples
    return profile_steps.profile_steps()


def _plain_steps(path: Path, device: torch.device) -> dict[str, float]:
    """Seconds of the same two steps as one would write them with diffusers and peft; and of the UNet as a CUDA graph."""
    backbone = open_backbone(str(path))
    unet = backbone.load_denoiser(torch.bfloat16).to(device)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=scope_modules(backbone, unet, "esd-x-strict"))
    embeds = torch.randn(2 * BATCH, 77, 768, device=device, dtype=torch.bfloat16)
    latents = torch.randn(BATCH, 4, 64, 64, device=device, dtype=torch.bfloat16)
    scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    scheduler.set_timesteps(20, device=device)
    times = torch.full((2 * BATCH,), 500, device=device)

    @torch.no_grad()
    def rollout_step() -> None:
        t = scheduler.timesteps[3]
        null, concept = unet(torch.cat([latents] * 2), t, encoder_hidden_states=embeds).sample.chunk(2)
        scheduler.step(null + 3 * (concept - null), t, latents)

    @torch.no_grad()
    def forward() -> None:
        unet(torch.cat([latents] * 2), times, encoder_hidden_states=embeds)

    rollout, graph = _seconds(rollout_step), _seconds(kernel_timings.graphed(forward))
    unet = peft.get_peft_model(unet, config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def training_step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            prediction = unet(latents, torch.tensor(500, device=device), encoder_hidden_states=embeds[:BATCH]).sample
            loss = (prediction.float() - latents.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return {"rollout_step_s": rollout, "training_step_s": _seconds(training_step), "forward_as_cuda_graph_s": graph}


def _seconds(step: Callable[[], None], count: int = 20) -> float:
    """Of one step, after a few to warm up."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def erasure() -> dict:
    """Whole default erasures of SD 1.5 (512²) and SDXL (1024²) against the authors' procedure, by time a training tuple."""
    found = {}
    for name, gib in (("SD 1.5", 20), ("SDXL", 60)):
        needs_gpu(gib)
        authors = PROCEDURES["authors' scripts"] | {"max_train_steps": PEER_STEPS}
        results = {"ours": _erase(model(name), {}), "authors": _erase(model(name), authors)}
        for result in results.values():
            seconds = sum(result["seconds"][phase] for phase in ("rollout", "distill"))
            result["seconds_a_tuple"] = seconds / result["training_tuples"]
        faster = results["authors"]["seconds_a_tuple"] / results["ours"]["seconds_a_tuple"]
        found[name] = results | {"times_as_fast": faster}
    return found


def memory() -> dict:
    """A short erasure of each model, from encoding to saving, with the process limited to 12 GiB and the goal as budget."""
    needs_gpu(12)
    torch.cuda.set_per_process_memory_fraction(12 * GIB / torch.cuda.get_device_properties(0).total_memory)
    found = {}
    try:
        for name, goal in GOALS.items():
            needed = {"FLUX.1": 40}.get(name, 10)
            if (free := shutil.disk_usage(tempfile.gettempdir()).free / GIB) < needed:
                found[name] = {"skipped": f"needs {needed} GiB of disk, there are {free:.0f}"}
                continue
            options = {"num_inference_steps": 4, "max_train_steps": 4, "memory_budget": f"{goal}GiB"}
            predicted = make_plan(
                EraseConfig(concept="circle", model=str(model(name)), **options), open_backbone(str(model(name)))
            )
            measured = _erase(model(name), options)["peak_memory_bytes"]
            found[name] = {
                "goal_bytes": goal * GIB,
                "settings": describe(predicted.config),
                "predicted_bytes": predicted.phases,
                "peak_reserved_bytes": measured,
                "within_goal": max(measured.values()) <= goal * GIB,
            }
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"limit_bytes": 12 * GIB, "models": found}


@functools.cache
def model(name: str) -> Path:
    """The directory of one of `real_models.MODELS`, with random weights, made once; it goes when the suite ends."""
    return make_model(name, Path(_models.name) / name.replace(" ", "_"))


def _erase(path: Path, options: dict) -> dict:
    """The result of one erasure, without what differs from run to run by name only."""
    with tempfile.TemporaryDirectory() as folder:
        base = {"concept": "circle", "model": str(path), "output": Path(folder) / "erased", "eval_seeds": 0}
        result = erase(EraseConfig(**base | options))
    return {k: result[k] for k in ("seconds", "peak_memory_bytes", "forward_equivalents", "training_tuples")}


SECTIONS: dict[str, Callable[[], dict]] = {
    "environment": environment,
    "correctness": correctness,
    "timings": timings,
    "synchronisation": synchronisation,
    "profile": profile,
    "steps": steps,
    "erasure": erasure,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the directory of all results")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    folder = args.output / re.sub(r"\W+", "_", device).strip("_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        print("no GPU here: only what needs none runs")
    lines, failed = [f"# {device}", ""], False
    for name in args.sections:
        start = time.perf_counter()
        try:
            result = SECTIONS[name]()
            said = "done"
            (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        except Skip as why:
            said = f"skipped: {why}"
        except Exception as error:  # one section must not cost the others' figures
            traceback.print_exc()
            said, failed = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}", True
        lines.append(f"- {name}: {said} ({time.perf_counter() - start:.0f} s)")
        print(lines[-1], flush=True)
        summary = [*lines, "", *(f"{key}: {value}  " for key, value in environment().items())]
        (folder / "summary.md").write_text("\n".join(summary) + "\n")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
