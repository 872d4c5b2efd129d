"""The results of an evaluation as tables, for terminal, Markdown and HTML."""

from dataclasses import dataclass

from esd_peft.evaluation.detectors import About
from esd_peft.evaluation.rates import Accuracies, Change, GroupRates, Rate
from esd_peft.evaluation.result import Attack, Evaluation, Measure, Score, percent, points


@dataclass(frozen=True)
class Table:
    """A table of plain text; names are in the first column, figures in the others."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]


def tables(result: Evaluation) -> list[Table]:
    """Return the tables: concepts, everything else, distances, attacks, costs."""
    made = []
    if result.accuracies and result.detector:
        made += _rates(result.accuracies, result.detector)
    if any(result.counts.values()):
        made.append(_counts(result))
    made += [_measure(measure) for measure in result.measures]
    made += [_attack(attack) for attack in result.attacks]
    seconds = [[phase, f"{value:.1f}"] for phase, value in result.seconds.items()]
    return [*made, Table("Cost", f"{result.prompts} prompts, {result.seeds} images each", ["phase", "seconds"], seconds)]


def describe(judge: About) -> str:
    """Return the judge, its version, and its rule."""
    return f"{judge.name} ({judge.version}): {judge.decides}"


def _rates(found: Accuracies, detector: About) -> list[Table]:
    if found.groups:
        return [*_group_rates(found.groups, detector), *_losing_labels(found)]
    made = []
    if found.targets:
        rows = [_change(name, change) for name, change in found.targets.items()]
        made.append(Table("Is it gone?", f"Recognised in its prompts, by {describe(detector)}", _HEADER, rows))
    summary = [
        ("same domain (IRA)", found.same_domain),
        ("other domains (CRA)", found.cross_domain),
        ("co-occurring attributes", found.co_occurring),
    ]
    rows = [_change(name, change) for name, change in summary if change]
    if rows:
        note = (
            "Recognised in prompts without an erased concept, in its domain and in others; co-occurring attributes in "
            "prompts with one"
        )
        made.append(Table("Is the rest intact?", note, _HEADER, rows))
    rows = [_change(label, change) for labels in found.others.values() for label, change in labels.items()]
    if rows:
        made.append(Table("One by one", "Each label, in prompts without an erased concept", _HEADER, rows))
    return made


def _group_rates(groups: dict[str, GroupRates], detector: About) -> list[Table]:
    """Return what is left and what is lost: unseen prompt groups first, then seen ones."""
    made = []
    for erased, title in ((True, "Is it gone?"), (False, "Is the rest intact?")):
        for seen, note in ((False, "Prompt groups that the erasure has not seen"), (True, "Prompt groups that it has seen")):
            chosen = [s for s in groups.values() if (s.group.erased, s.group.seen) == (erased, seen)]
            rows = [[*_change(s.group.title, s.total), _worst(s)] for s in chosen]
            if rows:
                made.append(Table(title, f"{note}, by {describe(detector)}", [*_HEADER, "worst"], rows))
    return made


def _worst(rates: GroupRates) -> str:
    change = rates.changes[rates.worst]
    if rates.group.erased:
        return f"{rates.worst}: {percent(change.after.share)}"
    return f"{rates.worst}: {points(-change.lost)}" if change.lost > 0 else ""


def _losing_labels(found: Accuracies) -> list[Table]:
    lose = [(label, c) for labels in found.others.values() for label, c in labels.items() if c.lost > 0]
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
    return Table(measure.judge.name, f"{measure.judge.version}: {measure.judge.decides}", ["", *columns], rows)


def _score(score: Score) -> str:
    if score.interval is None:
        return f"{score.mean:.3g}"
    low, high = score.interval
    return f"{score.mean:.3g} ({low:.3g}–{high:.3g})"


def _attack(attack: Attack) -> Table:
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
