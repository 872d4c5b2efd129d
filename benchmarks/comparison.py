"""Summaries of the runs of `erasure.py`: tables and a plot of means and worst runs, and the file with every run."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

OWN = "-"  # in place of a concept, where a row brings its own


def summary(runs: list[dict]) -> dict[str, Any]:
    """Return each prompt group's mean over concepts, with its 95 % interval and the worst run.

    A concept counts with the mean of its seeds. One concept has no interval: its seeds are more alike than concepts are.
    """
    from esd_peft.evaluation.intervals import bootstrap_mean

    groups: dict[str, dict] = {}
    for key in dict.fromkeys(key for r in runs for key in r["prompt_groups"]):
        group_rates = [r["prompt_groups"][key] for r in runs if key in r["prompt_groups"]]
        erased = group_rates[0]["erased"]
        values = [s["after"]["share"] if erased else s["lost"] for s in group_rates]
        by_concept: dict[str, list[float]] = {}
        for r, value in zip((r for r in runs if key in r["prompt_groups"]), values, strict=True):
            by_concept.setdefault(r["concept"], []).append(value)
        means = [sum(v) / len(v) for v in by_concept.values()]
        groups[key] = {
            "title": group_rates[0]["title"],
            "erased": erased,
            "seen": group_rates[0]["seen"],
            "before": sum(s["before"]["share"] for s in group_rates) / len(group_rates),
            "mean": sum(means) / len(means),
            "interval": bootstrap_mean(means, 0) if len(means) > 1 else _single_run_interval(group_rates),
            "worst": max(values),
        }
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]  # unknown for some runs
    return {
        "runs": len(runs),
        "prompt_groups": groups,
        "nfe": sum(r["nfe"] for r in runs) / max(1, len(runs)),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
    }


def _single_run_interval(group_rates: list[dict]) -> list[float] | None:
    """Return the interval of one run: what is left, over images or over concepts; what is lost, over prompts."""
    from esd_peft.evaluation.intervals import bootstrap_mean

    if len(group_rates) > 1:
        return None
    if not group_rates[0]["erased"]:
        return group_rates[0]["lost_interval"]
    each = [rates["after"]["share"] for rates in group_rates[0]["each"].values()]
    return bootstrap_mean(each, 0) if len(each) > 1 else group_rates[0]["after"]["interval"]


COLUMNS = {
    "paraphrases": "paraphrases",
    "synonyms": "synonyms",
    "samplers": "other samplers",
    "implicit": "implicit",
    "styled": "beside a style",
    "negative_prompt": "as negative prompt",
    "neighbours": "neighbours",
    "unrelated": "unrelated",
    "shared_word": "shared word",
    "co_occurring": "co-occurring",
    "beside_negative": "beside negative prompt",
    "recognisable": "recognisable",
    "retain_set": "retain set (seen)",
}


def in_common(by_method: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Select the runs with concepts and seeds that all methods have run; rows with concepts of their own have none."""
    cases = [{(r["concept"], r["seed"]) for r in runs if r["concept"] != OWN} for runs in by_method.values()]
    shared = set.intersection(*cases)
    return {m: [r for r in runs if (r["concept"], r["seed"]) in shared] for m, runs in by_method.items()}


def short_table(summaries: dict[str, dict]) -> str:
    """Return a table with a line for each method: mean and worst run, in per cent left and in points lost."""
    heads = [f"| | runs | {' | '.join(COLUMNS.values())} | NFE |", "|---" * (len(COLUMNS) + 3) + "|"]
    lines = []
    for name, s in summaries.items():
        rates = [s["prompt_groups"].get(key) for key in COLUMNS]
        cells = ["" if r is None else f"{100 * r['mean']:z.1f} ({100 * r['worst']:z.0f})" for r in rates]
        lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} |")
    return "\n".join([*heads, *lines])


def commands(file: Path) -> list[str]:
    """Return the commands whose runs `file` holds, and this one."""
    known = json.loads(file.read_text()).get("commands", []) if file.exists() else []
    return [*dict.fromkeys([*known, shlex.join(["python", *sys.argv])])]


def markdown(summaries: dict[str, dict], shared: dict[str, dict], command_lines: list[str]) -> str:
    """Return the summaries as tables: the runs in common in short, then all runs of each method."""
    lines = [line for command in command_lines for line in (f"`{command}`", "")]
    if any(s["runs"] for s in shared.values()):
        lines += ["The runs that all rows have in common: means (worst run), in per cent left and in points lost.", ""]
        lines += [short_table(shared), ""]
    lines += _tables(summaries)
    lines += [
        "A single run has the interval over its images, or its concepts if it has several; of a loss, over its prompts.",
        "",
    ]
    return "\n".join(lines)


def _tables(summaries: dict[str, dict]) -> list[str]:
    """Return tables of what is left of concepts, and of what other prompts lose, with intervals."""
    groups = {key: s for summed in summaries.values() for key, s in summed["prompt_groups"].items()}
    lines = []
    for erased, title in ((True, "left of the concept, in per cent of images"), (False, "lost on other prompts, in points")):
        keys = [key for seen in (False, True) for key, s in groups.items() if (s["erased"], s["seen"]) == (erased, seen)]
        if not keys:
            continue
        heads = [groups[key]["title"] + (" (seen)" if groups[key]["seen"] else "") for key in keys]
        lines += [f"All runs, {title}: mean over concepts (95 %; worst run)", ""]
        lines += [f"| | runs | {' | '.join(heads)} | NFE | CPU seconds |", "|---" * (len(keys) + 4) + "|"]
        for name, s in summaries.items():
            cells = [_cell(s["prompt_groups"].get(key)) for key in keys]
            seconds = "" if s["seconds"] is None else f"{s['seconds']:.1f}"
            lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} | {seconds} |")
        lines.append("")
    return lines


def _cell(s: dict | None) -> str:
    if s is None:
        return ""
    between = "" if s["interval"] is None else "{:.1f} to {:.1f}; ".format(*(100 * bound for bound in s["interval"]))
    return f"{100 * s['mean']:.1f} ({between}{100 * s['worst']:.0f})"


def plot(summaries: dict[str, dict], path: Path) -> None:
    """Plot what is left for paraphrases against what neighbours lose, and against the cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # a concept that every image shows has no neighbours
    summaries = {name: s for name, s in summaries.items() if {"paraphrases", "neighbours"} <= {*s["prompt_groups"]}}
    if not summaries:
        return
    figure, (loss, cost) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for number, (name, s) in enumerate(summaries.items()):
        left = 100 * s["prompt_groups"]["paraphrases"]["mean"]
        for axes, x in ((loss, 100 * s["prompt_groups"]["neighbours"]["mean"]), (cost, max(1, s["nfe"]))):
            axes.plot(x, left, "os^D"[number // 10], label=name)  # the colours repeat after ten
    loss.set(xlabel="lost by neighbours (points)", ylabel="left for paraphrases (%)")
    cost.set(xlabel="denoiser evaluations (NFE)", xscale="log")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(output: Path, suite: dict[str, dict], runs: list[dict]) -> str:
    """Write the results of the rows of `suite`; return the tables."""
    by_method = {m: [r for r in runs if r["method"] == m] for m in suite}
    by_method = {m: rows for m, rows in by_method.items() if rows}
    summaries = {m: summary(rows) for m, rows in by_method.items()}
    shared = {m: summary(rows) for m, rows in in_common(by_method).items()}
    options = {m: suite[m] for m in summaries}
    command_lines = commands(output.with_suffix(".json"))
    head = json.dumps(
        {"commands": command_lines, "cpus": os.cpu_count(), "options": options, "summary": summaries}, indent=1
    )
    lines = ",\n".join(json.dumps(run) for run in runs)  # one each, so that a difference shows which is new
    draft = output.with_suffix(".tmp")
    draft.write_text(f'{head.removesuffix("}").rstrip()},\n "runs": [\n{lines}\n ]\n}}\n')
    draft.replace(output.with_suffix(".json"))
    tables = markdown(summaries, shared, command_lines)
    output.with_suffix(".md").write_text(tables)
    plot(shared if any(s["runs"] for s in shared.values()) else summaries, output.with_suffix(".png"))
    return tables
