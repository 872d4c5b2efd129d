"""The results of an evaluation as tables, for terminal, Markdown and HTML."""

from dataclasses import dataclass

from esd_peft.evaluation.detectors import Judge
from esd_peft.evaluation.rates import Accuracies, Change, GroupRates, Rate
from esd_peft.evaluation.result import AttackResult, Evaluation, Measure, Score, percent, points


@dataclass(frozen=True)
class Table:
    """A table of plain text; names are in the first column, figures in the others."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def tables(result: Evaluation) -> list[Table]:
    """Return the tables: concepts, everything else, distances, attacks, costs."""
    result_tables = []
    if result.accuracies and result.detector:
        result_tables += _rates(result.accuracies, result.detector)
    if any(result.counts.values()):
        result_tables.append(_counts(result))
    result_tables += [_measure(measure) for measure in result.measures]
    result_tables += [_attack(attack) for attack in result.attacks]
    seconds = [[phase, f"{value:.1f}"] for phase, value in result.seconds.items()]
    return [
        *result_tables,
        Table("Cost", f"{result.prompts} prompts, {result.seeds} images each", ["phase", "seconds"], seconds),
    ]


def describe(judge: Judge) -> str:
    """Return the judge, its version, and its rule."""
    return f"{judge.name} ({judge.version}): {judge.criterion}"


def _rates(accuracies: Accuracies, detector: Judge) -> list[Table]:
    if accuracies.groups:
        return [*_group_rates(accuracies.groups, detector), *_losing_labels(accuracies)]
    result_tables = []
    if accuracies.targets:
        rows = [_change(name, change) for name, change in accuracies.targets.items()]
        result_tables.append(Table("Is it gone?", f"Recognised in its prompts, by {describe(detector)}", _HEADER, rows))
    summary = [
        ("same domain (IRA)", accuracies.same_domain),
        ("other domains (CRA)", accuracies.cross_domain),
        ("co-occurring attributes", accuracies.co_occurring),
    ]
    rows = [_change(name, change) for name, change in summary if change]
    if rows:
        note = (
            "Recognised in prompts without an erased concept, in its domain and in others; co-occurring attributes in "
            "prompts with one"
        )
        result_tables.append(Table("Is the rest intact?", note, _HEADER, rows))
    rows = [_change(label, change) for labels in accuracies.others.values() for label, change in labels.items()]
    if rows:
        result_tables.append(Table("One by one", "Each label, in prompts without an erased concept", _HEADER, rows))
    return result_tables


def _group_rates(groups: dict[str, GroupRates], detector: Judge) -> list[Table]:
    """Return what is left and what is lost: unseen prompt groups first, then seen ones."""
    result_tables = []
    for erased, title in ((True, "Is it gone?"), (False, "Is the rest intact?")):
        for seen, note in ((False, "Prompt groups that the erasure has not seen"), (True, "Prompt groups that it has seen")):
            chosen = [s for s in groups.values() if (s.group.erased, s.group.seen) == (erased, seen)]
            rows = [[*_change(s.group.title, s.total), _worst(s)] for s in chosen]
            if rows:
                result_tables.append(Table(title, f"{note}, by {describe(detector)}", [*_HEADER, "worst"], rows))
    return result_tables


def _worst(rates: GroupRates) -> str:
    change = rates.changes[rates.worst]
    if rates.group.erased:
        return f"{rates.worst}: {percent(change.after.share)}"
    return f"{rates.worst}: {points(-change.lost)}" if change.lost > 0 else ""


def _losing_labels(accuracies: Accuracies) -> list[Table]:
    lose = [(label, c) for labels in accuracies.others.values() for label, c in labels.items() if c.lost > 0]
    rows = [_change(label, change) for label, change in sorted(lose, key=lambda pair: -pair[1].lost)]
    note = "Each label that loses anything, in prompts without an erased concept"
    return [Table("One by one", note, _HEADER, rows)] if rows else []


_HEADER = ["", "before", "after", "points", "95 %", "n"]


def _change(name: str, change: Change) -> list[str]:
    after = change.after
    return [
        name,
        percent(change.before.share),
        percent(after.share),
        points(-change.lost),
        _interval(after),
        str(after.count),
    ]


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _counts(result: Evaluation) -> Table:
    before, after = result.counts["before"], result.counts["after"]
    rows = [[name, str(before.get(name, 0)), str(after.get(name, 0))] for name in sorted(before | after)]
    note = f"Detections in all images, by {describe(result.detector)}" if result.detector else ""
    return Table("Detections by class", note, ["class", "before", "after"], rows)


def _measure(measure: Measure) -> Table:
    columns = list(next(iter(measure.scores.values())))
    rows = [[group, *(_score(scores[name]) for name in columns)] for group, scores in measure.scores.items()]
    return Table(measure.judge.name, f"{measure.judge.version}: {measure.judge.criterion}", ["", *columns], rows)


def _score(score: Score) -> str:
    if score.interval is None:
        return f"{score.mean:.3g}"
    low, high = score.interval
    return f"{score.mean:.3g} ({low:.3g}–{high:.3g})"


def _attack(attack: AttackResult) -> Table:
    rows = [
        [f"{budget} {attack.unit}", percent(change.before.share), percent(change.after.share), _interval(change.after)]
        for budget, change in attack.curve
    ]
    header = ["budget", "base", "erased", "95 %"]
    note = (
        f"Recognised on the base without the attack, and on the erased model after it. {attack.about}; "
        f"{attack.nfe:,} denoiser evaluations (NFE)"
    )
    return Table(f"{attack.name}: {attack.concept}", note, header, rows)
