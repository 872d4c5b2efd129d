"""Every GPU check and benchmark of the project, in one command.

    python benchmarks/gpu_suite.py --output benchmarks/results            # all of it
    python benchmarks/gpu_suite.py --output benchmarks/results --part 1   # or in three calls, of 9 minutes at most each

Writes OUTPUT/<device>/<section>.json row by row, each as soon as it is measured, and OUTPUT/<device>/summary.md (with --part
N summary_N.md) with the driver and library versions. A check that fails loses only its own row, which has the reason. Needs
no network and no weights: models are built at their real size with random ones. What needs a GPU, or more of its memory than
there is, is skipped and says so.

The most important figures come first. How long a part takes no run has confirmed yet; the budgets, in seconds, are: part 1
correctness 10, synchronisation 20, timings 60, erasure 240; part 2 memory 300 (most of it for writing and reading FLUX.1);
part 3 steps 240 (of which compiling 150), profile 100.
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

import peft
from diffusers import DDIMScheduler

import authors_script
import kernel_timings
import profile_steps
from esd_kernels import guided_mse
from esd_peft import EraseConfig, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import describe, make_plan
from esd_peft.models import open_family
from esd_peft.models.compilation import compiled
from esd_peft.runtime.allocator import avoid_gaps
from esd_peft.runtime.devices import release, resolve_device
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.work import count_denoiser_calls
from job import Job
from readings import Readings
from real_models import make_model

GIB = 2**30
BATCH = 4  # of the step timings
GOALS = {"SD 1.5": 4, "SD 2.1": 6, "SDXL": 8, "FLUX.1": 11}  # GiB, of a 12 GB card
LIMIT = 11.2  # GiB of 12 that are free next to CUDA's context
OURS = ("load", "rollout", "train")  # the phases that training samples cost: with loading and the closed form
Rows = dict[str, Callable[[], object]]  # measurements, by the name of their row


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
    """Return the environment of the figures."""
    versions = {name: version(name) for name in ("torch", "triton", "diffusers", "peft", "bitsandbytes")}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions |= {"driver": subprocess.run(query, capture_output=True, text=True).stdout.strip().split("\n")[0]}
        versions |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return versions


def correctness() -> Rows:
    """The kernel, by dtype."""
    return {name: functools.partial(_kernel_errors, dtype) for name, dtype in kernel_timings.DTYPES.items()}


def _kernel_errors(dtype: torch.dtype) -> dict:
    """The kernel against the formula in fp64: fresh inputs, odd sizes, layouts, and memory full of NaN to start with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed = int(time.time())
    generator = torch.Generator(device).manual_seed(seed)
    worst = {"loss": 0.0, "gradient": 0.0}
    for shape in ((1, 1), (1, 4, 64, 64), (3, 41, 5), (7, 4, 64, 64), (2, 16, 5, 13, 17), (65, 4, 33, 31)):
        draw = {"generator": generator, "device": device}
        student = torch.randn(*shape, **draw).to(dtype)
        if len(shape) == 4:
            student = student.contiguous(memory_format=torch.channels_last)
        student.requires_grad_()
        teacher = torch.randn(2 * shape[0], *shape[1:], **draw).to(dtype)
        eta = torch.rand(shape[0], **draw) * 3
        poison = torch.full((8 * student.numel(),), torch.nan, device=device)
        del poison  # the next allocations contain NaN
        loss = guided_mse(student, teacher, eta)
        (grad,) = torch.autograd.grad(loss, student)
        null, concept = teacher.double().chunk(2)
        column = eta.double().view(-1, *[1] * (len(shape) - 1))
        error = student.detach().double() - (null - column * (concept - null))
        expected, slope = error.square().mean(), 2 * error / error.numel()
        worst["loss"] = max(worst["loss"], ((loss.double() - expected).abs() / expected).item())
        worst["gradient"] = max(worst["gradient"], ((grad.double() - slope).abs().max() / slope.abs().max()).item())
    # the interpreter truncates bf16 where a GPU rounds
    allowed = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[dtype]
    if not max(worst.values()) <= allowed:
        raise AssertionError(f"guided_mse is wrong: {worst}, where {allowed} is rounding")
    return {"seed": seed, "device": device, "worst_relative_error": worst}


def timings() -> Rows:
    """`benchmarks/kernel_timings.py` at a few sizes; the whole of it takes longer."""

    def measure(shape: str, batch: int) -> list[dict]:
        needs_gpu()
        return kernel_timings.benchmark([shape], [batch], ["bf16", "fp32"])

    sizes = [("SD 512", 1), ("SD 512", 8), ("SD 512", 64), ("video 480p", 4)]
    return {f"{shape}, {batch}": functools.partial(measure, shape, batch) for shape, batch in sizes}


def steps() -> Rows:
    """A rollout step and a training step of SD 1.5 at 512², eager, compiled, and as plain diffusers and peft make them."""
    options = {"trajectories": BATCH, "num_inference_steps": 20, "train_batch_size": BATCH, "max_train_steps": 40}
    options |= {"method": "trajectories", "learning_rate": 1e-4}  # random weights

    def ours(**more: object) -> dict:
        needs_gpu(20)
        return _our_steps(str(model("SD 1.5")), options | more)

    return {
        "ours": functools.partial(ours, compile="off"),
        "plain diffusers and peft": lambda: _plain_steps(needs_gpu(20), model("SD 1.5")),
        "ours, all layers learn": functools.partial(ours, compile="off", scope="full"),
        "ours, compiled": functools.partial(ours, compile="on"),
    }


def _our_steps(path: str, options: dict) -> dict[str, float]:
    """Seconds of the two steps in our loops, after a whole run that compiles and chooses algorithms."""
    job = Job(path, options)
    calls = count_denoiser_calls(job.config.buffer, job.config.training)
    with compiled(job.student.denoiser, job.config.runtime.compile, calls, job.student.device):
        job.run()
        profiler = job.rollout.profiler = PhaseProfiler(job.student.device)
        with profiler.phase("train"):
            job.run()
    return {
        "rollout_step_s": profiler.seconds["rollout"] / job.config.buffer.num_inference_steps,
        "training_step_s": profiler.seconds["train"] / job.config.training.max_train_steps,
    }


def synchronisation() -> Rows:
    """Rollouts and training with every wait of the host for the GPU an error, but for the readings of the loss."""

    def check(options: dict) -> dict:
        needs_gpu()
        job = Job("shapes", options | {"learning_rate": 1e-4})
        job.run()  # the first run compiles the kernel and chooses algorithms
        with Readings() as seen:
            losses = job.run()
        if seen.count != len(losses):
            raise AssertionError(f"{seen.count} readings from the GPU for {len(losses)} losses")
        return {"steps": job.config.training.max_train_steps, "readings": seen.count}

    rollouts = {"teacher": {}, "student": {"rollout": "student", "buffer_refresh_interval": 10}}
    return {
        f"{name}, {dtype}": functools.partial(check, options | {"dtype": dtype})
        for name, options in rollouts.items()
        for dtype in ("bfloat16", "float16")
    }


def profile() -> Rows:
    """`benchmarks/profile_steps.py`: measured times by kind of operation; its counts need no GPU."""

    def measure(name: str, gib: int) -> dict:
        needs_gpu(gib)  # the activations of four samples
        return profile_steps.profile(name)

    return {name: functools.partial(measure, name, gib) for name, gib in (("SD 1.5", 20), ("SDXL", 70))}


def _plain_steps(device: torch.device, path: Path) -> dict[str, float]:
    """Seconds of the same two steps as one would write them with diffusers and peft; and of the UNet as a CUDA graph."""
    family = open_family(str(path))
    unet = family.load_denoiser(torch.bfloat16).to(device)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=family.scope_modules(unet, "esd-x-strict"))
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
    """Return the seconds of one step, after a few warm-up steps."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def erasure() -> Rows:
    """Default erasures of SD 1.5 (512²) and SDXL (1024²); along trajectories and by the authors' script, by time a training
    sample."""

    def default(name: str, gib: int) -> dict:
        needs_gpu(gib)
        return _erase(model(name), {})

    def ours(name: str, gib: int) -> dict:
        needs_gpu(gib)
        result = _erase(model(name), {"method": "trajectories"})
        return result | {"seconds_a_sample": sum(result["seconds"][phase] for phase in OURS) / result["training_samples"]}

    def authors(name: str, gib: int) -> dict:
        device = needs_gpu(gib)
        release(device)
        return {"seconds_a_sample": authors_script.seconds_an_iteration(model(name), device)}

    rows: Rows = {}
    for name, gib in (("SD 1.5", 20), ("SDXL", 60)):
        rows[f"{name}, ours"] = functools.partial(default, name, gib)
        rows[f"{name}, ours along trajectories"] = functools.partial(ours, name, gib)
        rows[f"{name}, the authors' script"] = functools.partial(authors, name, gib)
    return rows


def memory() -> Rows:
    """A short erasure of each model, from encoding to saving, in what a 12 GiB card leaves for us, the goal as budget; of
    Stable Diffusion with the method layers too."""
    rows: Rows = {name: functools.partial(_memory_of, name, goal, "trajectories") for name, goal in GOALS.items()}
    layers = {name: goal for name, goal in GOALS.items() if name != "FLUX.1"}
    return rows | {f"{name}, layers": functools.partial(_memory_of, name, goal, "layers") for name, goal in layers.items()}


def _memory_of(name: str, goal: int, method: str) -> dict:
    needs_gpu(12)
    needed = {"FLUX.1": 40}.get(name, 10)
    if (free := shutil.disk_usage(tempfile.gettempdir()).free / GIB) < needed:
        raise Skip(f"needs {needed} GiB of disk, there are {free:.0f}")
    options = {"method": method, "num_inference_steps": 4, "max_train_steps": 4, "memory_budget": f"{goal}GiB"}
    family = open_family(str(model(name)))
    config = EraseConfig(concept="circle", model=str(model(name)), **options)
    predicted = make_plan(config, *resolve(config, family), family)
    torch.cuda.set_per_process_memory_fraction(LIMIT * GIB / torch.cuda.get_device_properties(0).total_memory)
    try:
        measured = _erase(model(name), options)["peak_memory_bytes"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "limit_bytes": int(LIMIT * GIB),
        "goal_bytes": goal * GIB,
        "settings": describe(predicted.config),
        "predicted_bytes": predicted.phases,
        "peak_reserved_bytes": measured,
        "within_goal": max(measured.values()) <= goal * GIB,
    }


@functools.cache
def model(name: str) -> Path:
    """The directory of one of `real_models.MODELS`, with random weights, made once; it goes when the suite ends."""
    return make_model(name, Path(_models.name) / name.replace(" ", "_"))


def _erase(path: Path, options: dict) -> dict:
    """The result of one erasure, without what differs from run to run by name only."""
    release(resolve_device("auto"))  # memory of earlier rows does not count for this peak
    with tempfile.TemporaryDirectory() as folder:
        base = {"concept": "circle", "model": str(path), "output": Path(folder) / "erased", "num_validation_images": 0}
        result = erase(EraseConfig(**base | options))
    return {k: result[k] for k in ("seconds", "peak_memory_bytes", "nfe", "training_samples")}


SECTIONS: dict[str, Callable[[], Rows]] = {
    "correctness": correctness,
    "synchronisation": synchronisation,
    "timings": timings,
    "erasure": erasure,
    "memory": memory,
    "steps": steps,
    "profile": profile,
}
PARTS = {
    1: ["correctness", "synchronisation", "timings", "erasure"],
    2: ["memory"],
    3: ["steps", "profile"],
}


def run_section(name: str, file: Path) -> list[str]:
    """Measure the rows of a section, writing `file` after each; returns a line about each."""
    lines, result = [], {}
    for row, measure in SECTIONS[name]().items():
        start = time.perf_counter()
        try:
            result[row] = measure()
            status = "done"
        except Skip as why:
            status = f"skipped: {why}"
        except Exception as error:  # it must not cost the others' figures
            traceback.print_exc()
            status = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            result[row] = {"failed": status}
        if result:
            file.write_text(json.dumps(result, indent=1) + "\n")
        lines.append(f"- {name}, {row}: {status} ({time.perf_counter() - start:.0f} s)")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the directory of all results")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    which.add_argument("--part", type=int, choices=PARTS, help="only the sections of this part")
    args = parser.parse_args()
    avoid_gaps()  # as every command does
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    folder = args.output / re.sub(r"\W+", "_", device).strip("_").lower()
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        print("no GPU here: only what needs none runs")
    lines: list[str] = []
    for name in PARTS.get(args.part, args.sections):
        lines += run_section(name, folder / f"{name}.json")
        summary = [f"# {device}", "", *lines, "", *(f"{key}: {value}  " for key, value in environment().items())]
        (folder / (f"summary_{args.part}.md" if args.part else "summary.md")).write_text("\n".join(summary) + "\n")
    raise SystemExit(1 if any(": failed: " in line for line in lines) else 0)


if __name__ == "__main__":
    main()
