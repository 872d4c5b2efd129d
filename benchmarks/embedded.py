"""Erase a shape, a colour and a texture from the embedded pipeline, three seeds each; the worst of them is the figure.

    python benchmarks/embedded.py --output benchmarks/results/embedded.json

Any option of the erase command may follow; it holds for every run (`--scope esd-u`, for example).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from esd_peft import EraseConfig, erase
from esd_peft.config import parse

CONCEPTS = ("circle", "red", "striped")
SEEDS = (0, 1, 2)


def summary(runs: list[dict]) -> dict:
    """The worst of several seeds of one concept."""
    rates = [next(iter(run["concepts"].values())) for run in runs]
    losses = [{name: r["before"] - r["after"] for name, r in run["others"].items()} for run in runs]
    worst = max(((loss, name) for run in losses for name, loss in run.items()), key=lambda pair: pair[0])
    return {
        "before": min(r["before"] for r in rates),
        "after": max(r["after"] for r in rates),
        "mean_loss_of_others": max(sum(run.values()) / len(run) for run in losses),
        "worst_loss_of_others": worst[0],
        "worst_other": worst[1],
        "forward_equivalents_per_tuple": max(r["forward_equivalents"] / r["training_tuples"] for r in runs),
        "seconds": max(sum(run["seconds"].values()) for run in runs),
        "training_seconds": max(sum(run["seconds"][p] for p in ("encode", "rollout", "distill")) for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS)
    args, options = parser.parse_known_args()
    found = {}
    for concept in args.concepts:
        runs = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                own = ["--concept", concept, "--seed", str(seed), "--output", f"{folder}/erased"]
                run = erase(parse(EraseConfig, "erase", own + options))
            del run["config"]["output"]
            runs.append(run)
        found[concept] = {"worst": summary(runs), "runs": runs}
        print(concept, json.dumps(found[concept]["worst"], indent=2))
        machine = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        result = {"command": ["python", *sys.argv], "machine": machine, "concepts": found}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
