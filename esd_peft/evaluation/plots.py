"""Small SVG plots: erased against kept, and attack success by budget. Every text in them is escaped."""

from collections.abc import Sequence

from markupsafe import Markup

from esd_peft.evaluation.rates import Accuracies, Change, Rate
from esd_peft.evaluation.result import Attack

WIDTH, LABEL, RIGHT = 460, 130, 20  # units; the page scales them
ROW, TOP = 22, 40
BEFORE, AFTER, GONE = "#8a8a86", "#1b62c4", "#b3341d"


def erased_against_kept(found: Accuracies) -> Markup:
    """A row for each concept and each label: where it stood before (hollow), where it stands (filled, with its interval)."""
    rows = [("erased", GONE, list(found.targets.items()))]
    rows += [(f"kept: {domain}", AFTER, list(labels.items())) for domain, labels in found.others.items()]
    y, parts = TOP, [_legend()]
    for title, colour, changes in rows:
        if changes:
            parts.append(Markup('<text x="0" y="{}" class="title">{}</text>').format(y + 6, title))
            y += ROW
        for name, change in changes:
            parts.append(_dumbbell(name, change, colour, y))
            y += ROW
        y += 6
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = _x(share)
        parts.insert(0, Markup('<path d="M{0} {1}V{2}" class="grid"/>').format(x, TOP - 8, y - 10))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{} %</text>').format(x, y + 6, round(100 * share)))
    return _svg(parts, y + 14, "How often each is recognised before and after, in percent of the pictures that ask for it")


def attack_success(attacks: Sequence[Attack]) -> Markup:
    """For each attack a curve over its budget, on the base and on the erased model."""
    parts, y = [_legend()], TOP
    for attack in attacks:
        parts.append(_curve(attack, y))
        y += 170
    return _svg(parts, y, "How often the erased concept is recognised after an attack, by budget")


def _curve(attack: Attack, top: int) -> Markup:
    left, height = 40, 110
    step = (WIDTH - left - RIGHT) / max(len(attack.curve) - 1, 1)
    base = top + 20 + height
    parts = [Markup('<text x="0" y="{}" class="title">{}: {}</text>').format(top + 6, attack.name, attack.concept)]
    for share in (0, 0.5, 1):
        y = base - height * share
        parts.append(Markup('<path d="M{} {}H{}" class="grid"/>').format(left, y, WIDTH - RIGHT))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{} %</text>').format(left - 6, y + 4, round(100 * share)))
    for colour, rates in ((BEFORE, [c.before for _, c in attack.curve]), (GONE, [c.after for _, c in attack.curve])):
        points = " ".join(f"{left + k * step:.1f},{base - height * rate.share:.1f}" for k, rate in enumerate(rates))
        parts.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>').format(points, colour))
        parts += [
            _dot(left + k * step, base - height * rate.share, colour, filled=colour != BEFORE)
            for k, rate in enumerate(rates)
        ]
    for k, (budget, _) in enumerate(attack.curve):
        x = left + k * step
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(round(x, 1), base + 18, budget))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - RIGHT, base + 32, attack.unit))
    return Markup("").join(parts)


def _dumbbell(name: str, change: Change, colour: str, y: int) -> Markup:
    low, high = change.after.interval
    line = '<path d="M{} {}H{}" stroke="{}" stroke-width="{}" opacity="{}"/>'
    shown = name if len(name) <= 20 else name[:19] + "…"
    return Markup("").join(
        [
            Markup("<g><title>{}: {} before, {} after</title>").format(name, _said(change.before), _said(change.after)),
            Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LABEL - 12, y + 4, shown),
            Markup(line).format(_x(low), y, _x(high), colour, 6, 0.3),
            Markup(line).format(_x(change.before.share), y, _x(change.after.share), BEFORE, 1, 1),
            _dot(_x(change.before.share), y, BEFORE, filled=False),
            _dot(_x(change.after.share), y, colour),
            Markup("</g>"),
        ]
    )


def _said(rate: Rate) -> str:
    return f"{rate.hits} of {rate.count}"


def _dot(x: float, y: float, colour: str, filled: bool = True) -> Markup:
    fill, radius = (colour, 4) if filled else ("none", 6)
    return Markup('<circle cx="{}" cy="{}" r="{}" fill="{}" stroke="{}" stroke-width="1.5"/>').format(
        x, y, radius, fill, colour
    )


def _legend() -> Markup:
    text = Markup('<text x="{}" y="14">{}</text>')
    shown = [_dot(LABEL, 10, BEFORE, filled=False), text.format(LABEL + 12, "before"), _dot(LABEL + 80, 10, GONE)]
    return Markup("").join([*shown, _dot(LABEL + 92, 10, AFTER), text.format(LABEL + 104, "after, with 95 % interval")])


def _x(share: float) -> float:
    return round(LABEL + share * (WIDTH - LABEL - RIGHT), 1)


def _svg(parts: list[Markup], height: int, title: str) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return Markup("").join([start, *parts, Markup("</svg>")])
