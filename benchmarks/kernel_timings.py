"""Times every kernel, forward and gradient, against what one would run instead.

    python benchmarks/kernel_timings.py --output benchmarks/results/h100/kernel_timings

Writes OUTPUT.csv (a row for each implementation, size and dtype) and OUTPUT.png. Needs a GPU for its figures; on a CPU
it runs the smallest size once, which shows that it runs. (It is not named kernels.py: scripts find their neighbours
first, and `kernels` is a package that diffusers looks for.)
"""

import argparse
import csv
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from esd_kernels import guided_mse, guided_mse_reference, unit_gradient

SHAPES = {
    "SD 512": (4, 64, 64),
    "SDXL 1024": (4, 128, 128),
    "FLUX 1024": (4096, 64),
    "video 480p": (16, 21, 60, 104),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Step = Callable[[], None]


@dataclass
class Case:
    """One size in one dtype, with inputs of its own."""

    name: str
    shape: tuple[int, ...]
    batch: int
    dtype: str
    device: str
    student: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        draw = {"generator": generator, "device": self.device}
        self.student = torch.randn(self.batch, *self.shape, **draw).to(DTYPES[self.dtype]).requires_grad_()
        self.teacher = torch.randn(2 * self.batch, *self.shape, **draw).to(DTYPES[self.dtype])
        self.eta = torch.rand(self.batch, **draw)

    @property
    def bytes_moved(self) -> int:
        """Return the least traffic of any implementation: three reads, and one write of the gradient."""
        return 4 * self.student.numel() * self.student.element_size()

    def step(self, loss: Callable[..., Tensor]) -> Step:
        """Loss and gradient, the gradient written anew each time."""

        def run() -> None:
            self.student.grad = None
            found = loss(self.student, self.teacher, self.eta)
            found.backward(unit_gradient(found))

        return run


def implementations(device: str) -> dict[str, Callable[..., Tensor]]:
    """The kernel, the eager formula, and the formula compiled."""
    found = {"kernel": guided_mse, "eager": guided_mse_reference}
    if device == "cuda":
        for mode in ("default", "max-autotune-no-cudagraphs"):
            found[f"compile, {mode}"] = torch.compile(guided_mse_reference, mode=mode, dynamic=False)
    return found


def graphed(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def launches(step: Step) -> int:
    """Kernels a step starts on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy of 1 GiB, read and write counted."""
    from triton.testing import do_bench

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (do_bench(lambda: target.copy_(source), return_mode="median") / 1e3)


def measure(case: Case, name: str, loss: Callable[..., Tensor], graph: bool, bandwidth: float) -> dict[str, object]:
    """One row of the table."""
    from triton.testing import do_bench

    step = case.step(loss)
    step()
    count = launches(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = torch.cuda.max_memory_allocated() - before
    timed = graphed(step) if graph else step
    low, median, high = (float(ms) for ms in do_bench(timed, quantiles=[0.2, 0.5, 0.8]))
    return row(case, name, graph) | {
        "ms": median,
        "ms_20": low,
        "ms_80": high,
        "copy_bandwidth": case.bytes_moved / (median / 1e3) / bandwidth,
        "launches": count,
        "peak_bytes": peak,
    }


def row(case: Case, name: str, graph: bool) -> dict[str, object]:
    """Return the settings of the measurement."""
    return {
        "kernel": "guided_mse",
        "size": case.name,
        "batch": case.batch,
        "dtype": case.dtype,
        "mebibytes": case.bytes_moved / 2**20,
        "implementation": name + (", graph" if graph else ""),
    }


def benchmark(shapes: list[str], batches: list[int], dtypes: list[str]) -> list[dict[str, object]]:
    """Every implementation at every size; on a CPU one call each of the first size, without figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    if device == "cpu":
        case = Case(shapes[0], SHAPES[shapes[0]], batches[0], dtypes[0], device)
        for name, loss in implementations(device).items():
            case.step(loss)()
            rows.append(row(case, name, graph=False))
        return rows
    bandwidth = copy_bandwidth()
    for shape, dtype, batch in itertools.product(shapes, dtypes, batches):
        case = Case(shape, SHAPES[shape], batch, dtype, device)
        torch.compiler.reset()  # else the fixed sizes pile up until it gives up compiling
        for (name, loss), graph in itertools.product(implementations(device).items(), (False, True)):
            rows.append(measure(case, name, loss, graph, bandwidth))
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Share of the copy bandwidth over bytes moved, a panel for each dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    figure, panels = pyplot.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), sharey=True, squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        for name in dict.fromkeys(r["implementation"] for r in rows):
            points = sorted(
                (r["mebibytes"], r["copy_bandwidth"]) for r in rows if (r["dtype"], r["implementation"]) == (dtype, name)
            )
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=name)
        axes.set(title=f"guided_mse, {dtype}", xscale="log", xlabel="MiB that must be moved")
    panels[0][0].set_ylabel("share of the copy bandwidth")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    rows = benchmark(args.shapes, args.batches, args.dtypes)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if "ms" in rows[0]:
        plot(rows, args.output.with_suffix(".png"))
    else:
        print("no GPU here: every implementation ran once on the CPU, without figures")
    print(f"{len(rows)} rows in {args.output.with_suffix('.csv')}")


if __name__ == "__main__":
    main()
