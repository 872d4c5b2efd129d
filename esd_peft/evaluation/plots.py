"""Small SVG plots: erasure against preservation, and attack success by budget. Every text in them is escaped."""

from collections.abc import Sequence

from markupsafe import Markup

from esd_peft.evaluation.rates import Accuracies, Change, Rate
from esd_peft.evaluation.result import AttackResult

WIDTH, LEFT, RIGHT = 460, 130, 20  # units, which the page scales; margins
ROW, TOP, CURVE = 22, 40, 110
BEFORE, AFTER, GONE = "#8a8a86", "#1b62c4", "#b3341d"
LONGEST = 17  # letters of a label


def erasure_against_preservation(accuracies: Accuracies) -> Markup:
    """A row for each concept and each label: where it stood before (hollow), where it stands (filled, with its interval)."""
    groups = [("erased", GONE, accuracies.targets)]
    groups += [(f"kept: {domain}", AFTER, labels) for domain, labels in accuracies.others.items()]
    y, parts = TOP, _legend("before", "after, with 95 % interval")
    for title, colour, changes in groups:
        if changes:
            parts.append(_text(0, y + 4, title, "start", "title"))
            y += ROW
        for name, change in changes.items():
            parts.append(_dumbbell(name, change, colour, y))
            y += ROW
        y += 6
    axis = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        axis += [_grid(f"M{_x(share)} {TOP - 8}V{y - 10}"), _text(_x(share), y + 6, f"{100 * share:.0f} %")]
    title = "How often each is recognised before and after, in percent of the images that ask for it"
    return _svg(axis + parts, y + 14, title)


def attack_success(attacks: Sequence[AttackResult]) -> Markup:
    """Plot a curve over the budget for each attack, on the base and on the erased model."""
    parts = _legend("on the base", "on the erased model")
    for i, attack in enumerate(attacks):
        parts += _curve(attack, TOP + i * (CURVE + 60))
    height = TOP + len(attacks) * (CURVE + 60)
    return _svg(parts, height, "How often the erased concept is recognised after an attack, by budget")


def _curve(attack: AttackResult, top: int) -> list[Markup]:
    left, base = 52, top + 20 + CURVE
    step = (WIDTH - left - RIGHT) / max(len(attack.curve) - 1, 1)
    parts = [_text(0, top + 4, f"{attack.name}: {attack.concept}", "start", "title")]
    for share in (0, 0.5, 1):
        y = base - CURVE * share
        parts += [_grid(f"M{left} {y}H{WIDTH - RIGHT}"), _text(left - 6, y + 4, f"{100 * share:.0f} %", "end")]
    for colour, rates in ((BEFORE, [c.before for _, c in attack.curve]), (GONE, [c.after for _, c in attack.curve])):
        points = [(round(left + k * step, 1), round(base - CURVE * rate.share, 1)) for k, rate in enumerate(rates)]
        line = Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>')
        parts += [line.format(" ".join(f"{x},{y}" for x, y in points), colour), *(_dot(x, y, colour) for x, y in points)]
    parts += [_text(round(left + k * step, 1), base + 18, str(budget)) for k, (budget, _) in enumerate(attack.curve)]
    return [*parts, _text(WIDTH - RIGHT, base + 32, attack.unit, "end")]


def _dumbbell(name: str, change: Change, colour: str, y: int) -> Markup:
    low, high = change.after.interval
    line = Markup('<path d="M{} {}H{}" stroke="{}" stroke-width="{}" opacity="{}"/>')
    parts = [
        _text(LEFT - 12, y + 4, name if len(name) <= LONGEST else name[: LONGEST - 1] + "…", "end"),
        line.format(_x(low), y, _x(high), colour, 6, 0.3),
        line.format(_x(change.before.share), y, _x(change.after.share), BEFORE, 1, 1),
        _dot(_x(change.before.share), y, BEFORE),
        _dot(_x(change.after.share), y, colour),
    ]
    title = f"{name}: {_counts(change.before)} before, {_counts(change.after)} after"
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(parts))


def _counts(rate: Rate) -> str:
    return f"{rate.hits} of {rate.count}"


def _legend(before: str, after: str) -> list[Markup]:
    second = LEFT + 110
    dots = [_dot(LEFT, 10, BEFORE), _dot(second, 10, GONE)]
    return [*dots, _text(LEFT + 12, 14, before, "start"), _text(second + 12, 14, after, "start")]


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _dot(x: float, y: float, colour: str) -> Markup:
    """Hollow for before, filled for after: told apart without colour."""
    fill, radius = ("none", 6) if colour == BEFORE else (colour, 4)
    return Markup('<circle cx="{}" cy="{}" r="{}" fill="{}" stroke="{}" stroke-width="1.5"/>').format(
        x, y, radius, fill, colour
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>').format(x, y, anchor, kind, text)


def _grid(path: str) -> Markup:
    return Markup('<path d="{}" class="grid"/>').format(path)


def _svg(parts: list[Markup], height: int, title: str) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return Markup("").join([start, *parts, Markup("</svg>")])
