"""The table that the erase command ends with."""

from typing import Any

from esd_peft.evaluation.text import MARKS


def result_table(result: dict[str, Any]) -> str:
    """What `result.json` holds, for people: rates where there are any, then losses and costs."""
    verdicts = result.get("evaluation", {}).get("verdict", [])
    lines = [*(f"{MARKS[verdict['level']]} {verdict['text']}" for verdict in verdicts), *([""] if verdicts else [])]
    if result["concepts"]:
        width = max(map(len, [*result["concepts"], *result["others"], "everything else"])) + 2
        lines.append(f"{'recognised in pictures':<{max(width, 24)}}before   after")
        lines += [_rates(name, rates, width) for name, rates in result["concepts"].items()]
        lines.append("-" * (max(width, 24) + 14))
        lines += [_rates(name, rates, width) for name, rates in result["others"].items()]
    if result["others"]:
        means = {k: sum(r[k] for r in result["others"].values()) / len(result["others"]) for k in ("before", "after")}
        lines.append(_rates("everything else", means, width))
    if result["concepts"]:
        lines.append("")
    seconds, peaks = result["seconds"], result["peak_memory_bytes"]
    lines.append(f"{'phase':<12}{'seconds':>9}{'peak MiB':>10}")
    lines += [f"{name:<12}{seconds[name]:>9.1f}{peaks[name] / 2**20:>10.0f}" for name in seconds]
    lines.append(f"{'total':<12}{sum(seconds.values()):>9.1f}{max(peaks.values()) / 2**20:>10.0f}")
    forwards, tuples = result["forward_equivalents"], result["training_tuples"]
    lines += [
        "",
        f"loss {result['loss']['first']:.5f} → {result['loss']['last']:.5f}, "
        f"{result['trained_parameters']:,} parameters trained",
        f"{forwards:,} forward-equivalents for {tuples:,} training tuples: {forwards / tuples:.2f} each",
    ]
    if result["direction_left"]:
        curve = ", ".join(f"{fraction:.2f} ({step})" for step, fraction in result["direction_left"])
        lines.append(f"left of the concept's direction on held-out pairs (at step): {curve}")
    return "\n".join(lines)


def _rates(name: str, rates: dict[str, float], width: int) -> str:
    return f"{name:<{max(width, 24)}}{rates['before']:>5.1%}  {rates['after']:>6.1%}"
