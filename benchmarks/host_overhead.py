"""How long the host is busy with `guided_mse` and its gradient, launching apart: the kernels are replaced by nothing.

    python benchmarks/host_overhead.py --output benchmarks/results/host_overhead.json

Needs no GPU. At the sizes of SD's latents a GPU is done before the host is, so this is what a training step waits for.
The tensors are tiny, so that what PyTorch's CPU operations compute takes no time either.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor

from esd_kernels import fused_guided_mse, guided_mse_reference

CALLS, ROUNDS = 500, 20


class Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: None


def microseconds(loss: Callable[[], Tensor], student: Tensor) -> float:
    """Of one loss and its gradient: the least of the rounds' means, since other processes only ever add to it."""
    means = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.autograd.grad(loss(), student)
        means.append((time.perf_counter() - start) / CALLS)
    return round(min(means) * 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fused_guided_mse._guided_mse_kernel = fused_guided_mse._scale_kernel = Nothing()
    student, teacher = torch.randn(4, 4, 2, 2, requires_grad=True), torch.randn(8, 4, 2, 2)
    eta, weight = torch.ones(4), torch.ones(4)
    inputs = (student, teacher, 0.0, eta, None, weight)
    ways = {
        "autograd function": lambda: fused_guided_mse.FusedGuidedMSE.apply(*inputs),
        "custom op": lambda: torch.ops.esd_kernels.guided_mse(*inputs)[0],
        "eager formula": lambda: guided_mse_reference(student, teacher, eta, None, weight),
    }
    found = {name: microseconds(loss, student) for name, loss in ways.items()}
    args.output.write_text(json.dumps({"microseconds": found, "torch": torch.__version__}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
