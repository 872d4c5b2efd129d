"""Compare ways to erase on the embedded pipeline: same model, seeds and evaluation.

    python benchmarks/erasure.py procedures --output benchmarks/results/erasure
    python benchmarks/erasure.py sweep --output benchmarks/results/sweep --seeds 0

Writes OUTPUT.json (every run), OUTPUT.md (a table of means and worsts) and OUTPUT.png (erased against kept, and what
it cost; needs matplotlib), anew after every run. What OUTPUT.json already holds is not run again, so an interrupted
command goes on where it was.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
from pathlib import Path

CONCEPTS = ("circle", "star", "heart", "red", "blue", "striped", "dotted")

# What the peers have in common: one wording, nothing held, nothing protected, constant rate, SD's usual 50 steps.
_PEER = {"wordings": "bare", "hold": 0, "null_space": 0, "closed_form": False, "lr_scheduler": "constant",
         "num_inference_steps": 50, "anticipate": 0, "scope": "esd-x", "train_batch_size": 1, "max_train_steps": 200,
         "refill_every": 1}  # fmt: skip
_PAPER = _PEER | {"rollout": "student", "adapter": "none"}
_AUTHORS = _PEER | {"rollout": "teacher", "adapter": "none"}
_LECO = _PEER | {"rollout": "student", "adapter": "lora", "rank": 4}
# Their published rates are for Stable Diffusion. Of these each gets the one that is best here, by what is left of the
# concept plus the worst loss of anything else (benchmarks/results/peer_rates.md).
PEER_RATES: dict[str, dict] = {
    f"{name}, {rate:g}": peer | {"learning_rate": rate}
    for name, peer in (("paper", _PAPER), ("authors' scripts", _AUTHORS), ("LECO-like", _LECO))
    for rate in (1e-4, 3e-4, 1e-3)
}
PROCEDURES: dict[str, dict] = {
    "paper": _PAPER | {"learning_rate": 3e-4},
    "authors' scripts": _AUTHORS | {"learning_rate": 1e-3},
    "LECO-like": _LECO | {"learning_rate": 3e-4},
    "ours": {},
    "contrastive": {"objective": "contrastive", "null_space": 0},
    "ours, student, R=5": {"rollout": "student", "refill_every": 5},
    "ours, student, R=10": {"rollout": "student", "refill_every": 10},
    "ours, student, R=25": {"rollout": "student", "refill_every": 25},
}
_NO_TRAINING = {"max_train_steps": 1, "learning_rate": 1e-9, "trajectories": 1}
SWEEP: dict[str, dict] = {
    "default": {},
    "closed form alone": _NO_TRAINING,
    "no closed form": {"closed_form": False},
    "no closed form, 50 steps, 12 trajectories": {"closed_form": False, "max_train_steps": 50, "trajectories": 12},
    "rank 1": {"rank": 1},
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16},
    "eta 0.5": {"eta": 0.5},
    "eta 2": {"eta": 2},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "learning rate 2e-2": {"learning_rate": 2e-2},
    "4 trajectories": {"trajectories": 4},
    "16 trajectories": {"trajectories": 16},
    "4 trajectories of 50 steps": {"num_inference_steps": 50, "trajectories": 4},
    "16 trajectories of 12 steps": {"num_inference_steps": 12, "trajectories": 16},
    "20 training steps": {"max_train_steps": 20},
    "80 training steps": {"max_train_steps": 80},
    "80 steps of batch 4": {"train_batch_size": 4, "max_train_steps": 80},
    "20 steps of batch 16": {"train_batch_size": 16, "max_train_steps": 20},
    "nothing held": {"hold": 0},
    "a quarter held": {"hold": 0.25},
    "no null space": {"null_space": 0},
    "null space 0.99": {"null_space": 0.99},
    "null space 0.9999": {"null_space": 0.9999},
    "no anticipation": {"anticipate": 0},
    "three in four anticipate": {"anticipate": 0.75},
    "all anticipate": {"anticipate": 1},
    "bare wording": {"wordings": "bare"},
    "noisier half of the timesteps": {"min_timestep": 500},
    "min-SNR 5": {"snr_gamma": 5},
    "until 0": {"until": 0, "lr_scheduler": "constant"},
    "until -0.5": {"until": -0.5, "lr_scheduler": "constant"},
}
_STAY = ["a square", "a triangle", "a star", "a cross", "a heart", "a red shape", "a blue shape", "a striped shape"]
SCOPES: dict[str, dict] = {
    "esd-x-strict": {},
    "esd-x-strict, adapter none": {"adapter": "none"},
    "esd-x": {"scope": "esd-x"},
    "esd-u": {"scope": "esd-u"},
    "esd-u, student rollouts": {"scope": "esd-u", "rollout": "student"},
    "esd-u, student rollouts, preserve": {"scope": "esd-u", "rollout": "student", "preserve": _STAY, "hold": 0.375},
}
CLAIMS: dict[str, dict] = {
    "one concept": {"concept": "circle"},
    "five concepts": {"concept": ["circle", "heart", "red", "blue", "striped"]},
    "five others": {"concept": ["square", "cross", "green", "purple", "dotted"]},
    "striped from circle": {"concept": "striped", "erase_from": "circle"},
    "red from star": {"concept": "red", "erase_from": "star"},
    "dotted from heart": {"concept": "dotted", "erase_from": "heart"},
    "blue from square": {"concept": "blue", "erase_from": "square"},
    "circle to square": {"concept": "circle", "map_to": "square"},
    "red to blue": {"concept": "red", "map_to": "blue"},
}
SUITES = {"peer-rates": PEER_RATES, "claims": CLAIMS, "scopes": SCOPES, "procedures": PROCEDURES, "sweep": SWEEP}


def run(job: tuple[str, dict, str, int], pictures: int) -> dict:
    """Erase one concept one way with one seed; the rates of the result."""
    import torch

    torch.set_num_threads(1)  # workers share the cores
    from esd_peft import EraseConfig, erase
    from esd_peft.adapters.saved import read_adapter
    from esd_peft.evaluation.gallery import Gallery
    from esd_peft.models import open_backbone

    method, options, concept, seed = job
    if "preserve" in options:
        options = options | {"preserve": [p for p in options["preserve"] if concept not in p.split()]}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "erased"
        config = EraseConfig(**{"concept": concept} | options, seed=seed, output=output, eval_seeds=0, device="cpu")
        result = erase(config)
        backbone, cpu = open_backbone(None), torch.device("cpu")
        judged = config.model_copy(update={"eval_seeds": pictures, "seed": 0})  # the same noise for every run
        gallery = Gallery(backbone, judged, cpu, torch.float32)
        before = _before(gallery)
        denoiser = read_adapter(output).apply(backbone.load_denoiser(torch.float32))
        concepts, others = gallery.rates(before, gallery.take(denoiser, "after"))
    lost = {name: r["before"] - r["after"] for name, r in others.items()}
    return {
        "method": method,
        "options": job[1],
        "concept": concept,
        "seed": seed,
        "pictures": pictures,
        "before": min(r["before"] for r in concepts.values()),
        "after": max(r["after"] for r in concepts.values()),  # the worst, where there are several
        "after_each": {name: r["after"] for name, r in concepts.items()},
        "lost": lost,
        "mean_lost": sum(lost.values()) / len(lost),
        "worst_lost": max(lost.values()),
        "worst_other": max(lost, key=lambda name: lost[name]),
        "forward_equivalents": result["forward_equivalents"],
        "training_tuples": result["training_tuples"],
        "seconds": sum(result["seconds"].get(phase, 0) for phase in ("encode", "references", "rollout", "distill")),
        "peak_memory_bytes": max(result["peak_memory_bytes"].values()),
    }


def _before(gallery):  # type: ignore[no-untyped-def]
    """The base's pictures, made once a concept: they are the same for every method and seed."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = (gallery.backbone.path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    key = f"{gallery.prompts} {gallery.config.eval_seeds} {hashlib.sha256(weights).hexdigest()}"
    cache = Path(tempfile.gettempdir()) / f"esd_peft_before_{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not cache.is_file():
        draft = cache.with_suffix(f".{os.getpid()}")
        save_file({"pictures": gallery.take(gallery.backbone.load_denoiser(torch.float32), "before")}, draft)
        draft.replace(cache)
    return load_file(cache)["pictures"]


def summary(runs: list[dict]) -> dict[str, float]:
    """Means over concepts and seeds, and the worst of them."""

    def mean(key: str) -> float:
        return sum(r[key] for r in runs) / len(runs)

    return {
        "runs": len(runs),
        "after": mean("after"),
        "after_worst": max(r["after"] for r in runs),
        "mean_lost": mean("mean_lost"),
        "worst_lost": mean("worst_lost"),
        "worst_lost_worst": max(r["worst_lost"] for r in runs),
        "forward_equivalents": mean("forward_equivalents"),
        "per_tuple": mean("forward_equivalents") / mean("training_tuples"),
        "seconds": mean("seconds"),
        "peak_memory_bytes": mean("peak_memory_bytes"),
    }


def markdown(found: dict[str, dict[str, float]], command: str) -> str:
    """The summaries as a table."""
    lines = [
        f"`{command}`",
        "",
        "| | runs | recognised after: mean (worst run) | others lose: mean | worst attribute: mean (worst run) | "
        "forward-equivalents (per tuple) | seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in found.items():
        lines.append(
            f"| {name} | {s['runs']} | {s['after']:.1%} ({s['after_worst']:.1%}) | {100 * s['mean_lost']:.2f} points | "
            f"{100 * s['worst_lost']:.1f} ({100 * s['worst_lost_worst']:.1f}) points | "
            f"{s['forward_equivalents']:,.0f} ({s['per_tuple']:.1f}) | {s['seconds']:.1f} | "
            f"{s['peak_memory_bytes'] / 2**20:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Erased against kept, and erased against cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (kept, cost) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for name, s in found.items():
        for axes, x in ((kept, 100 * s["worst_lost"]), (cost, s["forward_equivalents"])):
            axes.plot(x, 100 * s["after"], "o", label=name)
    kept.set(xlabel="worst other attribute loses (points, mean over runs)", ylabel="concept still recognised (%)")
    cost.set(xlabel="denoiser forward-equivalents", xscale="log")
    figure.legend(*kept.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--methods", nargs="+", help="only these rows of the suite")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=2, help="a prompt")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    if unknown := set(args.methods or ()) - set(suite):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not in the suite; it has {', '.join(suite)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs = (
        json.loads(args.output.with_suffix(".json").read_text())["runs"] if args.output.with_suffix(".json").exists() else []
    )
    # what was run with other options under the same name, or judged on other pictures, is run anew
    runs = [r for r in runs if r.get("options") == suite.get(r["method"]) and r["pictures"] == args.pictures]
    done = {(r["method"], r["concept"], r["seed"]) for r in runs}
    jobs = [
        (m, suite[m], c, s)
        for s in args.seeds
        for m in args.methods or suite
        for c in (["-"] if "concept" in suite[m] else args.concepts)  # some rows bring their own
    ]
    jobs = [job for job in jobs if (job[0], *job[2:]) not in done]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a kill ends the workers too
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for result in pool.imap_unordered(functools.partial(run, pictures=args.pictures), jobs):
            runs.append(result)
            save(args.output, args.suite, runs)
            print(f"{len(runs)} {result['method']}, {result['concept']}: {result['after']:.1%} after", flush=True)
    print(save(args.output, args.suite, runs))


def save(output: Path, suite: str, runs: list[dict]) -> str:
    """Write all results; returns the table."""
    by_method = {m: [r for r in runs if r["method"] == m] for m in SUITES[suite]}
    found = {m: summary(rows) for m, rows in by_method.items() if rows}
    options = {m: SUITES[suite][m] for m in found}
    command = shlex.join(["python", *sys.argv])
    result = {"command": command, "cpus": os.cpu_count(), "options": options, "summary": found, "runs": runs}
    draft = output.with_suffix(".tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(output.with_suffix(".json"))
    output.with_suffix(".md").write_text(markdown(found, command))
    plot(found, output.with_suffix(".png"))
    return markdown(found, command)


if __name__ == "__main__":
    main()
