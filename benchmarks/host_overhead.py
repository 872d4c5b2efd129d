"""Host time of `guided_mse` and its gradient, without the driver's share of a launch.

    python benchmarks/host_overhead.py --output benchmarks/results/host_overhead.json
    python benchmarks/host_overhead.py --output benchmarks/results/host_overhead.json --against COMMIT

Needs no GPU. At the sizes of SD's latents a GPU is done before the host is, so this is what a training step waits for.
The kernels are compiled for compute capability 9.0 and go through Triton's own launch up to the call of the driver, which
does nothing. PyTorch's operations run on the CPU, on tensors so tiny that computing takes no time. What is counted is the
thread's own time on the processor, and the ways take turns. `--against` adds the kernel as it was at a commit.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from esd_kernels import fused_guided_mse, guided_mse, guided_mse_reference, unit_gradient

CALLS, ROUNDS = 200, 50
public = sys.modules[guided_mse.__module__]
KERNEL = Path(fused_guided_mse.__file__)


class NoDevice:
    """A driver whose launches do nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (None, None, 0, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 2**17}
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *_: None


def as_it_was(commit: str, directory: Path) -> ModuleType:
    """`fused_guided_mse` at `commit`, beside the one that is imported."""
    words = ["git", "-C", KERNEL.parent, "show", f"{commit}:./{KERNEL.name}"]
    code = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    file = directory / "as_it_was.py"
    file.write_text(code.replace('"esd_kernels::', '"as_it_was::'))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def microseconds(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the microseconds of a call of each: the smallest mean of all rounds, since other processes only add to it."""
    means: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.thread_time()
            for _ in range(CALLS):
                way()
            means[name].append((time.thread_time() - start) / CALLS)
    return {name: round(min(rounds) * 1e6, 1) for name, rounds in means.items()}


def ways_to_the_gradient(before: ModuleType | None) -> dict[str, Callable[[], object]]:
    """Loss and gradient, each in another way."""
    student, teacher = torch.randn(4, 4, 2, 2, requires_grad=True), torch.randn(8, 4, 2, 2)
    eta, weight = torch.ones(4), torch.ones(4)
    inputs = (student, teacher, eta, None, weight)

    def kernel(module: ModuleType = fused_guided_mse) -> Tensor:
        public.fused = module
        return guided_mse(*inputs)

    def custom_op() -> Tensor:
        return torch.ops.esd_kernels.guided_mse(student, teacher, 0.0, *inputs[2:])[0]

    def with_unit_gradient(loss: Callable[[], Tensor]) -> object:
        value = loss()
        return torch.autograd.grad(value, student, unit_gradient(value))

    ways = {
        "kernel, unit_gradient": lambda: with_unit_gradient(kernel),
        "kernel": lambda: torch.autograd.grad(kernel(), student),
        "custom op": lambda: torch.autograd.grad(custom_op(), student),
        "eager formula": lambda: torch.autograd.grad(guided_mse_reference(*inputs), student),
        "eager formula, unit_gradient": lambda: with_unit_gradient(lambda: guided_mse_reference(*inputs)),
    }
    return ways | ({"kernel as it was": lambda: torch.autograd.grad(kernel(before), student)} if before else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", metavar="COMMIT", help="measure the kernel of this commit too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    driver.set_active(NoDevice())
    public._fuses = lambda _: True
    with tempfile.TemporaryDirectory() as directory:
        before = as_it_was(args.against, Path(directory)) if args.against else None
        timings = microseconds(ways_to_the_gradient(before))
    record = {"microseconds": timings, "torch": torch.__version__} | ({"as it was": args.against} if args.against else {})
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(timings))


if __name__ == "__main__":
    main()
