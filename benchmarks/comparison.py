"""What the runs of `erasure.py` say: tables and a plot of means and worsts, and the file that holds every run."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

OWN = "-"  # in place of a concept, where a row brings its own


def summary(runs: list[dict]) -> dict[str, Any]:
    """Of each stratum the mean over concepts, of whose seeds the mean counts, with its 95 % interval, and the worst run.

    Seeds of one concept are more alike than concepts are; so several of one concept have no interval.
    """
    from esd_peft.evaluation.intervals import bootstrap_mean

    strata: dict[str, dict] = {}
    for key in dict.fromkeys(key for r in runs for key in r["strata"]):
        found = [r["strata"][key] for r in runs if key in r["strata"]]
        erased = found[0]["erased"]
        values = [s["after"]["share"] if erased else s["lost"] for s in found]
        by_concept: dict[str, list[float]] = {}
        for r, value in zip((r for r in runs if key in r["strata"]), values, strict=True):
            by_concept.setdefault(r["concept"], []).append(value)
        means = [sum(v) / len(v) for v in by_concept.values()]
        strata[key] = {
            "title": found[0]["title"],
            "erased": erased,
            "seen": found[0]["seen"],
            "before": sum(s["before"]["share"] for s in found) / len(found),
            "mean": sum(means) / len(means),
            "interval": bootstrap_mean(means, 0) if len(means) > 1 else _of_one_run(found),
            "worst": max(values),
        }
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]  # of some runs nobody knows
    return {
        "runs": len(runs),
        "strata": strata,
        "nfe": sum(r["nfe"] for r in runs) / max(1, len(runs)),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
    }


def _of_one_run(found: list[dict]) -> list[float] | None:
    """What is left, over its images, or its concepts where there are several; what is lost, over its prompts."""
    from esd_peft.evaluation.intervals import bootstrap_mean

    if len(found) > 1:
        return None
    if not found[0]["erased"]:
        return found[0]["lost_interval"]
    each = [rates["after"]["share"] for rates in found[0]["each"].values()]
    return bootstrap_mean(each, 0) if len(each) > 1 else found[0]["after"]["interval"]


SHORT = {
    "wordings": "other wordings",
    "synonyms": "other names",
    "sampling": "other samplers",
    "unnamed": "unnamed",
    "neighbours": "neighbours",
    "unlisted": "the rest",
    "beside": "beside it",
    "listed": "(seen) listed",
}


def in_common(by_method: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Of each method the runs with the concepts and seeds that all methods have run; rows that bring concepts of their own
    have none in common."""
    cases = [{(r["concept"], r["seed"]) for r in runs if r["concept"] != OWN} for runs in by_method.values()]
    shared = set.intersection(*cases)
    return {m: [r for r in runs if (r["concept"], r["seed"]) in shared] for m, runs in by_method.items()}


def short_table(found: dict[str, dict]) -> str:
    """One line a method: means, and the worst run, in per cent that are left and points that are lost."""
    heads = [f"| | runs | {' | '.join(SHORT.values())} | NFE |", "|---" * (len(SHORT) + 3) + "|"]
    lines = []
    for name, s in found.items():
        rates = [s["strata"].get(key) for key in SHORT]
        cells = ["" if r is None else f"{100 * r['mean']:z.1f} ({100 * r['worst']:z.0f})" for r in rates]
        lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} |")
    return "\n".join([*heads, *lines])


def commands(file: Path) -> list[str]:
    """Those that made what `file` holds, each a part of it, and this one."""
    known = json.loads(file.read_text()).get("commands", []) if file.exists() else []
    return [*dict.fromkeys([*known, shlex.join(["python", *sys.argv])])]


def markdown(found: dict[str, dict], shared: dict[str, dict], made_by: list[str]) -> str:
    """The summaries as tables: of the runs in common in short, and of each all that is known."""
    lines = [line for command in made_by for line in (f"`{command}`", "")]
    if any(s["runs"] for s in shared.values()):
        lines += ["The runs that all rows have in common: means (worst run), in per cent left and in points lost.", ""]
        lines += [short_table(shared), ""]
    lines += _tables(found)
    lines += ["A single run: over its images, or its concepts if it has several; what is lost, over its prompts.", ""]
    return "\n".join(lines)


def _tables(found: dict[str, dict]) -> list[str]:
    """What is left of the concepts, and what is lost of the rest, with intervals."""
    strata = {key: s for summed in found.values() for key, s in summed["strata"].items()}
    lines = []
    for erased, says in ((True, "left of the concept, in per cent of images"), (False, "lost of the rest, in points")):
        keys = [key for seen in (False, True) for key, s in strata.items() if (s["erased"], s["seen"]) == (erased, seen)]
        if not keys:
            continue
        heads = [("(seen) " if strata[key]["seen"] else "") + strata[key]["title"] for key in keys]
        lines += [f"All runs, {says}: mean over concepts (95 %; worst run)", ""]
        lines += [f"| | runs | {' | '.join(heads)} | NFE | CPU seconds |", "|---" * (len(keys) + 4) + "|"]
        for name, s in found.items():
            cells = [_cell(s["strata"].get(key)) for key in keys]
            seconds = "" if s["seconds"] is None else f"{s['seconds']:.1f}"
            lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} | {seconds} |")
        lines.append("")
    return lines


def _cell(s: dict | None) -> str:
    if s is None:
        return ""
    between = "" if s["interval"] is None else "{:.1f} to {:.1f}; ".format(*(100 * bound for bound in s["interval"]))
    return f"{100 * s['mean']:.1f} ({between}{100 * s['worst']:.0f})"


def plot(found: dict[str, dict], path: Path) -> None:
    """What is left by other wordings against what unlisted neighbours lose, and against the cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # of what is drawn everywhere nothing is a neighbour
    found = {name: s for name, s in found.items() if {"wordings", "neighbours"} <= {*s["strata"]}}
    if not found:
        return
    figure, (kept, cost) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for number, (name, s) in enumerate(found.items()):
        left = 100 * s["strata"]["wordings"]["mean"]
        for axes, x in ((kept, 100 * s["strata"]["neighbours"]["mean"]), (cost, max(1, s["nfe"]))):
            axes.plot(x, left, "os^D"[number // 10], label=name)  # the colours repeat after ten
    kept.set(xlabel="neighbours that nobody listed lose (points)", ylabel="left in unseen wordings (%)")
    cost.set(xlabel="denoiser evaluations (NFE)", xscale="log")
    figure.legend(*kept.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(output: Path, suite: dict[str, dict], runs: list[dict]) -> str:
    """Write all results, of the rows of `suite`; returns the tables."""
    by_method = {m: [r for r in runs if r["method"] == m] for m in suite}
    by_method = {m: rows for m, rows in by_method.items() if rows}
    found = {m: summary(rows) for m, rows in by_method.items()}
    shared = {m: summary(rows) for m, rows in in_common(by_method).items()}
    options = {m: suite[m] for m in found}
    made_by = commands(output.with_suffix(".json"))
    head = json.dumps({"commands": made_by, "cpus": os.cpu_count(), "options": options, "summary": found}, indent=1)
    lines = ",\n".join(json.dumps(run) for run in runs)  # one each, so that a difference shows which is new
    draft = output.with_suffix(".tmp")
    draft.write_text(f'{head.removesuffix("}").rstrip()},\n "runs": [\n{lines}\n ]\n}}\n')
    draft.replace(output.with_suffix(".json"))
    tables = markdown(found, shared, made_by)
    output.with_suffix(".md").write_text(tables)
    plot(shared if any(s["runs"] for s in shared.values()) else found, output.with_suffix(".png"))
    return tables
