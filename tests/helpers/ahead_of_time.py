"""Compiles every launch of `esd_kernels` for a GPU that is not there, and reads what became of it from the machine code.

    python tests/helpers/ahead_of_time.py cuda 90        # sm_90; cuda 75 … 120, or hip gfx942
    python tests/helpers/ahead_of_time.py cuda 80 0 3    # every third kind of launch, from the first on

Prints a JSON list, a row for each compiled launch. It runs in a process of its own, because the tests' own process has
the kernels interpreted. The launchers themselves are called, so that a launch has just the arguments, and
specialisations, that it has on a GPU; only the very last step, handing machine code to a driver, is left out.
"""

import collections
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import torch

if sys.argv[1] == "hip":
    torch.version.hip = "as in PyTorch's build for AMD"  # asked by the launchers

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from esd_kernels import fused_guided_mse as fused

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# samples of SD latents and of FLUX's, whose rows divide by 16, and of a size that nothing divides. Triton takes a batch of 1
# for a constant: launches of a kind that are alike in both share their code.
SIZES = [(16384, 262144), (205,)]
BATCHES = (1, 8, 2)


class StandIn:
    """As much of a driver as a compilation asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Warmed:
    """A kernel whose launches only compile."""

    def __init__(self, kernel, compiled: list) -> None:
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))


def launches(first: int, step: int):
    """Yield a description of each launch, after it: those of every `step`th kind from `first` on, and with a `step` of 1
    also those that share their code."""
    kinds = itertools.product(SIZES, DTYPES.items(), (None, *itertools.product((False, True), repeat=3)))
    for sizes, (name, dtype), options in itertools.islice(kinds, first, None, step):
        for batch, n in itertools.product(BATCHES, sizes) if step == 1 else itertools.product(BATCHES[:2], sizes[:1]):
            x, row = torch.empty(batch, n, dtype=dtype), {"dtype": name, "batch": batch, "n": n}
            if options is None:
                fused.launch_scaling(x, torch.empty(()), 1.0)
                yield row | {"kernel": "scale", "flags": ""}
                continue
            anchor, etas, weight = options
            per_sample = torch.empty(batch)
            fused.launch(
                x,
                torch.empty(2 * batch, n, dtype=dtype),
                1.0,
                per_sample if etas else None,
                x if anchor else None,
                per_sample if weight else None,
            )
            flags = [flag for flag, on in (("anchor", anchor), ("etas", etas), ("weight", weight)) if on]
            yield row | {"kernel": "guided_mse", "flags": " ".join(flags)}


def measure(kernel) -> dict:
    """Registers, spills, the kinds of memory access of a compiled kernel, and what its atomics order (`atomics`)."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel.asm["amdgcn"])


def _nvidia(kernel) -> dict:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    code = subprocess.run([tools / "nvdisasm", "-ndf", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = collections.Counter(re.findall(r"\b((?:LDG|STG|LDL|STL|RED|ATOM|ATOMG)[\w.]*)", code))
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local) + sum(c for op, c in found.items() if op.startswith(("LDL", "STL"))),
        "atomics": _nvidia_atomics(kernel.asm["ptx"]),
        "wide": sum(c for op, c in found.items() if op.startswith("LDG") and ".128" in op),
        "loads": sum(c for op, c in found.items() if op.startswith("LDG")),
        "wide_stores": sum(c for op, c in found.items() if op.startswith("STG") and ".128" in op),
    }


def _nvidia_atomics(code: str) -> list[str]:
    """Each atomic in the PTX between the store before it and what comes after it, those that the same threads execute marked
    alike; and loads that a cache may answer without asking what others have written."""
    access = re.findall(r"(?:(@%p\d+) )?\b((?:st\.global|ld\.global|atom|red|bar\.sync)[\w.]*)", code)
    found = [op for _, op in access if op.startswith("ld.global.nc")]
    for i, (threads, op) in enumerate(access):
        if op.startswith(("atom", "red")):
            store = next(before for before in reversed(access[:i]) if before[1].startswith("st.global"))
            found += [f"{store[1]} by {'the same' if store[0] == threads else 'others'}", op, access[i + 1][1]]
    return found


def _amd(code: str) -> dict:
    found = collections.Counter(re.findall(r"\b((?:global|buffer|flat|scratch)_(?:load|store|atomic)\w*)", code))

    def count(*parts: str) -> int:
        return sum(c for op, c in found.items() if all(part in op for part in parts))

    waiting = re.escape("s_waitcnt vmcnt(0)")
    spills = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", code)
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", code).group(1)),
        "spilled": sum(map(int, spills)) + count("scratch"),
        # with what writes the caches back before them, is waited for, and empties the caches after them
        "atomics": re.findall(rf"\w+_atomic_\w+|buffer_(?:wbl2|inv) \w+|{waiting}(?=\s+(?:\w+_atomic|buffer_inv))", code),
        "wide": count("load", "x4"),
        "loads": count("load"),
        "wide_stores": count("store", "x4"),
    }


def main(backend: str, arch: str, first: str = "0", step: str = "1") -> list[dict]:
    driver.set_active(StandIn(GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)))
    compiled: list = []
    fused._guided_mse_kernel = Warmed(fused._guided_mse_kernel, compiled)
    fused._scale_kernel = Warmed(fused._scale_kernel, compiled)
    measured: dict[str, dict] = {}  # launches of one specialisation share their code
    rows = []
    for launch in launches(int(first), int(step)):
        kernel = compiled.pop()
        if kernel.hash not in measured:
            measured[kernel.hash] = measure(kernel)
        rows.append(launch | measured[kernel.hash])
    print(f"{len(measured)} kernels for {backend} {arch}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
