"""Attacks on erased embedded pipelines: can the concept be brought back?

    python benchmarks/attacks.py --output benchmarks/results/attacks --seeds 0

Every run erases a concept and evaluates it with attacks (`python -m esd_peft.evaluate --attack ...`).
Writes OUTPUT.json (every run) and OUTPUT.md (means over concepts and seeds) after every run; runs in
OUTPUT.json are not repeated.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from comparison import commands
from esd_peft.worlds import WORLDS

METHODS: dict[str, dict] = {
    "default": {},
    "--method denoiser": {"method": "denoiser"},
    "--method denoiser --max-train-steps 70": {"method": "denoiser", "max_train_steps": 70},
}


def run(method: str, concept: str, seed: int, args: argparse.Namespace) -> dict:
    """Erase a concept and evaluate the result under attack."""
    import torch

    torch.set_num_threads(args.threads)
    from esd_peft import EraseConfig, EvaluateConfig, erase, evaluate

    with tempfile.TemporaryDirectory() as folder:
        erased, report = Path(folder) / "erased", Path(folder) / "evaluation"
        fixed = {"model": args.model, "seed": seed, "output": erased, "num_validation_images": 0, "device": "cpu"}
        erasure = erase(EraseConfig(concept=concept, **fixed, **METHODS[method]))
        options = {"limit": args.limit, "seeds": 1, "attack": args.attacks, "attack_images": args.images}
        options |= {"num_inference_steps": args.num_inference_steps, "attack_steps": args.attack_steps}
        evaluation = evaluate(EvaluateConfig(erased=erased, output=report, device="cpu", seed=seed, **options))
    assert evaluation.accuracies is not None and evaluation.accuracies.others_total is not None
    neighbours = evaluation.accuracies.groups.get("neighbours")  # a concept that every image shows has none
    return {
        "method": method,
        "model": args.model,
        "options": METHODS[method],
        "concept": concept,
        "seed": seed,
        "budget": options,
        "named": evaluation.accuracies.targets[concept].after.share,
        "neighbours_lost": neighbours and neighbours.total.lost,
        "others_lost": evaluation.accuracies.others_total.lost,
        "attacks": evaluation.to_dict()["attacks"],
        "nfe": erasure["nfe"],
        "erase_seconds": sum(erasure["seconds"].values()),
        "evaluate_seconds": evaluation.seconds,
    }


def markdown(runs: list[dict], command_lines: list[str]) -> str:
    """Return tables of means over concepts and seeds, then by concept."""
    lines = [line for command in command_lines for line in (f"`{command}`", "")]
    for title, groups in (("", [""]), ("By concept", sorted({r["concept"] for r in runs}))):
        lines += [f"## {title}", ""] if title else []
        for group in groups:
            rows = [r for r in runs if not group or r["concept"] == group]
            lines += [f"**{group}**", ""] if group else []
            lines += table(rows)
    return "\n".join(lines) + "\n"


def table(runs: list[dict]) -> list[str]:
    """Return a table with a line for each method: the concept's rate when prompted and after each attack, and losses."""
    attacks = {a["name"]: a["unit"] for r in runs for a in r["attacks"]}
    header = ["", "runs", "prompted", *attacks, "neighbours lose", "others lose", "NFE", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for method in METHODS:
        rows = [r for r in runs if r["method"] == method]
        if not rows:
            continue
        cells = [method, str(len(rows)), f"{mean([r['named'] for r in rows]):.1%}"]
        for name, unit in attacks.items():
            ends = [a["curve"][-1] for r in rows for a in r["attacks"] if a["name"] == name]
            shares = [end["after"]["share"] for end in ends]
            cells.append(f"{mean(shares):.1%} (worst {max(shares):.1%}) at {ends[0]['budget']} {unit}")
        for key in ("neighbours_lost", "others_lost"):
            lost = [100 * r[key] for r in rows if r[key] is not None]
            cells.append(f"{mean(lost):z.1f} (worst {max(lost):z.1f}) points" if lost else "")
        cells += [f"{mean([r['nfe'] for r in rows]):,.0f}", f"{mean([r['erase_seconds'] for r in rows]):,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def mean(values: list[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--model", choices=WORLDS, default="emoji")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--concepts", nargs="+", default=["fox", "red apple", "ink"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--attacks", nargs="+", default=["textual-inversion"])
    parser.add_argument("--attack-steps", type=int, help="of each attack that learns")
    parser.add_argument("--images", type=int, default=24, help="judged at each point of an attack")
    parser.add_argument("--limit", type=int, help="prompts of the suite for the concept, and as many others; left out: all")
    parser.add_argument("--num-inference-steps", type=int, default=12, help="of an image")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    path = args.output.with_suffix(".json")
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    runs = [r for r in runs if r.get("model") == args.model]  # others, and those of an earlier form, are not comparable
    done = {(r["method"], r["concept"], r["seed"], json.dumps(r["options"])) for r in runs}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for concept in args.concepts:
            for method in args.methods:
                print(f"{concept}, seed {seed}: {method}", flush=True)
                if (method, concept, seed, json.dumps(METHODS[method])) not in done:
                    runs.append(run(method, concept, seed, args))
                    save(args.output, runs)
    print(save(args.output, runs))


def save(output: Path, runs: list[dict]) -> str:
    """Write all results; return the tables."""
    command_lines = commands(output.with_suffix(".json"))
    draft = output.with_suffix(".tmp")
    draft.write_text(json.dumps({"commands": command_lines, "cpus": os.cpu_count(), "runs": runs}, indent=1) + "\n")
    draft.replace(output.with_suffix(".json"))
    output.with_suffix(".md").write_text(markdown(runs, command_lines))
    return markdown(runs, command_lines)


if __name__ == "__main__":
    main()
