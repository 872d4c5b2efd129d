"""Compare ways to erase on the embedded pipeline: same model, seeds and evaluation.

    python benchmarks/erasure.py procedures --output benchmarks/results/erasure
    python benchmarks/erasure.py sweep --output benchmarks/results/sweep --seeds 0

Writes OUTPUT.json (every run), OUTPUT.md (a table of means and worsts) and OUTPUT.png (erased against kept, and what
it cost; needs matplotlib), anew after every run. What OUTPUT.json already holds is not run again, so an interrupted
command goes on where it was.
"""

import argparse
import contextlib
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

import yaml

RECIPES = Path(__file__).parents[1] / "recipes"
CONCEPTS = ("circle", "star", "heart", "red", "blue", "striped", "dotted")


def recipe(name: str) -> dict:
    """The options of `recipes/NAME.yaml`, without their groups."""
    groups = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return {option: value for group in groups.values() for option, value in group.items()}


# the peers' procedures, for as many steps as the authors' scripts take
_PAPER, _AUTHORS, _LECO = (recipe(name) | {"max_train_steps": 200} for name in ("paper", "authors", "leco"))
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
    "ours, student, R=5": {"rollout": "student", "buffer_refresh_interval": 5},
    "ours, student, R=10": {"rollout": "student", "buffer_refresh_interval": 10},
    "ours, student, R=25": {"rollout": "student", "buffer_refresh_interval": 25},
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
    "eta 0.5": {"negative_guidance": 0.5},
    "eta 2": {"negative_guidance": 2},
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
    "no preservation samples": {"preservation_ratio": 0},
    "a quarter preservation samples": {"preservation_ratio": 0.25},
    "no null space": {"null_space": 0},
    "null space 0.99": {"null_space": 0.99},
    "null space 0.9999": {"null_space": 0.9999},
    "no guided rollouts": {"guided_rollout_ratio": 0},
    "three in four rollouts guided": {"guided_rollout_ratio": 0.75},
    "all rollouts guided": {"guided_rollout_ratio": 1},
    "bare prompt": {"prompt_templates": "bare"},
    "noisier half of the timesteps": {"min_timestep": 500},
    "min-SNR 5": {"snr_gamma": 5},
    "stop at 0": {"stop_at": 0, "lr_scheduler": "constant"},
    "stop at -0.5": {"stop_at": -0.5, "lr_scheduler": "constant"},
}
_STAY = ["a square", "a triangle", "a star", "a cross", "a heart", "a red shape", "a blue shape", "a striped shape"]
SCOPES: dict[str, dict] = {
    "esd-x-strict": {},
    "esd-x-strict, adapter none": {"adapter_type": "none"},
    "esd-x": {"scope": "esd-x"},
    "esd-u": {"scope": "esd-u"},
    "esd-u, student rollouts": {"scope": "esd-u", "rollout": "student"},
    "esd-u, student rollouts, preserve": {
        "scope": "esd-u",
        "rollout": "student",
        "preserve": _STAY,
        "preservation_ratio": 0.375,
    },
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


def run(job: tuple[str, dict, str, int], images: int) -> dict:
    """Erase one concept one way with one seed; the rates of the result."""
    import torch

    torch.set_num_threads(1)  # workers share the cores
    from esd_peft import EraseConfig, erase
    from esd_peft.adapters.saved import read_adapter
    from esd_peft.evaluation.validation import ValidationSampler
    from esd_peft.models import open_family

    method, options, concept, seed = job
    if "preserve" in options:
        options = options | {"preserve": [p for p in options["preserve"] if concept not in p.split()]}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "erased"
        fixed = {"seed": seed, "output": output, "num_validation_images": 0, "device": "cpu"}
        config = EraseConfig(**{"concept": concept} | options | fixed)
        result = erase(config)
        family, cpu = open_family("shapes"), torch.device("cpu")
        names = config.prompts.concept_names
        sampler = ValidationSampler(family, names, images, 48, 0, cpu, torch.float32)  # the same noise for every run
        sampler.stores["before"] = _before(sampler)
        sampler.make(read_adapter(output).apply(family.load_denoiser(torch.float32)), "after")
        concepts, others = sampler.shares()
    lost = {name: r["before"] - r["after"] for name, r in others.items()}
    return {
        "method": method,
        "options": job[1],
        "concept": concept,
        "seed": seed,
        "images": images,
        "before": min(r["before"] for r in concepts.values()),
        "after": max(r["after"] for r in concepts.values()),  # the worst, where there are several
        "after_each": {name: r["after"] for name, r in concepts.items()},
        "lost": lost,
        "mean_lost": sum(lost.values()) / len(lost),
        "worst_lost": max(lost.values()),
        "worst_other": max(lost, key=lambda name: lost[name]),
        "nfe": result["nfe"],
        "training_samples": result["training_samples"],
        "seconds": sum(result["seconds"].get(phase, 0) for phase in ("encode", "references", "rollout", "train")),
        "peak_memory_bytes": max(result["peak_memory_bytes"].values()),
    }


def _before(sampler):  # type: ignore[no-untyped-def]
    """The base's images, made once a concept: they are the same for every method and seed."""
    import torch

    from esd_peft.evaluation.image_cache import ImageMemory
    from esd_peft.io.images import decode_image

    weights = (sampler.family.path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    key = f"{sampler.evaluator.prompts} {sampler.seeds} {hashlib.sha256(weights).hexdigest()}"
    cache = Path(tempfile.gettempdir()) / f"esd_peft_before_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not cache.is_dir():
        sampler.make(sampler.family.load_denoiser(torch.float32), "before")
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.mkdir()
        for (i, k), image in sampler.stores["before"].images.items():
            image.save(draft / f"{i}_{k}.png")
        with contextlib.suppress(OSError):  # another worker was quicker
            draft.rename(cache)
    places = {path: tuple(map(int, path.stem.split("_"))) for path in cache.iterdir()}
    return ImageMemory({place: decode_image(path) for path, place in places.items()})


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
        "nfe": mean("nfe"),
        "per_sample": mean("nfe") / mean("training_samples"),
        "seconds": mean("seconds"),
        "peak_memory_bytes": mean("peak_memory_bytes"),
    }


def markdown(found: dict[str, dict[str, float]], command: str) -> str:
    """The summaries as a table."""
    lines = [
        f"`{command}`",
        "",
        "| | runs | recognised after: mean (worst run) | others lose: mean | worst attribute: mean (worst run) | "
        "NFE (per sample) | seconds | peak MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, s in found.items():
        lines.append(
            f"| {name} | {s['runs']} | {s['after']:.1%} ({s['after_worst']:.1%}) | {100 * s['mean_lost']:.2f} points | "
            f"{100 * s['worst_lost']:.1f} ({100 * s['worst_lost_worst']:.1f}) points | "
            f"{s['nfe']:,.0f} ({s['per_sample']:.1f}) | {s['seconds']:.1f} | "
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
        for axes, x in ((kept, 100 * s["worst_lost"]), (cost, s["nfe"])):
            axes.plot(x, 100 * s["after"], "o", label=name)
    kept.set(xlabel="worst other attribute loses (points, mean over runs)", ylabel="concept still recognised (%)")
    cost.set(xlabel="denoiser evaluations (NFE)", xscale="log")
    figure.legend(*kept.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--methods", nargs="+", help="only these rows of the suite")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2, help="a prompt")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    if unknown := set(args.methods or ()) - set(suite):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not in the suite; it has {', '.join(suite)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    runs = (
        json.loads(args.output.with_suffix(".json").read_text())["runs"] if args.output.with_suffix(".json").exists() else []
    )
    # what was run with other options under the same name, or judged on other images, is run anew
    runs = [r for r in runs if r.get("options") == suite.get(r["method"]) and r["images"] == args.images]
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
        for result in pool.imap_unordered(functools.partial(run, images=args.images), jobs):
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
