"""How often images show what was asked for: the target, the same domain, the other domains (UA, IRA, CRA)."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esd_peft.evaluation.intervals import bootstrap_mean, wilson
from esd_peft.evaluation.strata import STRATA, Stratum
from esd_peft.evaluation.suites import Roles
from esd_peft.worlds.world import Prompt


@dataclass(frozen=True)
class Rate:
    """So many of so many images."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 % (Wilson)."""
        return wilson(self.hits, self.count)

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.hits + other.hits, self.count + other.count)


@dataclass(frozen=True)
class Change:
    """The same rate before and after, on the same prompts and seeds."""

    before: Rate
    after: Rate

    @property
    def lost(self) -> float:
        return self.before.share - self.after.share

    def __add__(self, other: "Change") -> "Change":
        return Change(self.before + other.before, self.after + other.after)

    def to_dict(self) -> dict[str, Any]:
        """As result.json holds it."""
        return {
            name: {"hits": r.hits, "count": r.count, "share": r.share, "interval": r.interval}
            for name, r in (("before", self.before), ("after", self.after))
        }


Shares = dict[str, dict[str, float]]  # name: before, after: share of images


@dataclass(frozen=True)
class Accuracies:
    """After UnlearnCanvas (arXiv 2402.11846): UA = 1 − accuracy on the target, IRA in its domain, CRA in the others.

    There, CRA also counts the prompts that ask for the target; here these stand apart, as `beside`.
    """

    targets: dict[str, Change]  # concept: shows all of it, where it is asked for
    others: dict[str, dict[str, Change]]  # domain (the target's first): label: shows it, where no concept is asked for
    beside: Change | None  # shows what else such a prompt asks for, where a concept is asked for
    target_domains: frozenset[str]
    strata: dict[str, "StratumRates"] = field(default_factory=dict)  # by key, where the prompts belong to some

    @property
    def same_domain(self) -> Change | None:
        return _sum([c for domain, labels in self.others.items() for c in labels.values() if domain in self.target_domains])

    @property
    def cross_domain(self) -> Change | None:
        return _sum(
            [c for domain, labels in self.others.items() for c in labels.values() if domain not in self.target_domains]
        )

    @property
    def kept(self) -> Change | None:
        """Both domains together."""
        return _sum([c for labels in self.others.values() for c in labels.values()])

    @property
    def shares(self) -> tuple[Shares, Shares]:
        """Of the concepts, and of everything else, as the erase command's result.json holds them."""
        others = [(label, change) for labels in self.others.values() for label, change in labels.items()]
        concepts, rest = (
            {name: {"before": c.before.share, "after": c.after.share} for name, c in changes}
            for changes in (self.targets.items(), others)
        )
        return concepts, rest


@dataclass(frozen=True)
class StratumRates:
    """What was recognised in the images of a stratum (`esd_peft.evaluation.strata`)."""

    stratum: Stratum
    changes: dict[str, Change]  # by concept, by label, or by domain
    interval: tuple[float, float]  # of `lost`, 95 % (bootstrap over prompts)

    @property
    def total(self) -> Change:
        """Of all images."""
        total, *more = self.changes.values()
        return functools.reduce(Change.__add__, more, total)

    @property
    def worst(self) -> str:
        """The one that loses most; of the concepts the one of which most is left."""
        key = (lambda n: self.changes[n].after.share) if self.stratum.erased else (lambda n: self.changes[n].lost)
        return max(self.changes, key=key)

    def to_dict(self) -> dict[str, Any]:
        """As result.json holds it."""
        return {
            "title": self.stratum.title,
            "erased": self.stratum.erased,
            "seen": self.stratum.seen,
            **self.total.to_dict(),
            "lost": self.total.lost,
            "lost_interval": self.interval,
            "worst": self.worst,
            "worst_lost": self.changes[self.worst].lost,
            "each": {name: change.to_dict() for name, change in self.changes.items()},
        }


Seen = Sequence[Sequence[dict[str, str]]]  # [prompts][seeds]: what an image shows, by domain


def accuracies(prompts: list[Prompt], roles: Roles, before: Seen, after: Seen) -> Accuracies:
    """What a detector saw in the images of each prompt, before and after, as rates."""

    def change(wanted: dict[str, str], rows: list[int]) -> Change:
        return Change(*(rate(wanted, [image for i in rows for image in half[i]]) for half in (before, after)))

    targets = {concept: change(roles.wanted[concept], rows) for concept, rows in roles.asking.items()}
    others: dict[str, dict[str, Change]] = {}
    labels = dict.fromkeys(pair for prompt in prompts for pair in prompt.labels.items())
    for domain, label in labels:
        rows = [i for i in roles.kept if prompts[i].labels.get(domain) == label]
        if rows:
            others.setdefault(domain, {})[label] = change({domain: label}, rows)
    rest = [
        change({domain: label}, [i])
        for concept, rows in roles.asking.items()
        for i in rows
        for domain, label in prompts[i].labels.items()
        if domain not in roles.wanted[concept]
    ]
    domains = frozenset(domain for wanted in roles.wanted.values() for domain in wanted)
    others = {domain: others[domain] for domain in sorted(others, key=lambda domain: domain not in domains)}
    return Accuracies(targets, others, _sum(rest), domains, _strata(prompts, roles, change))


def _strata(
    prompts: list[Prompt], roles: Roles, change: Callable[[dict[str, str], list[int]], Change]
) -> dict[str, StratumRates]:
    found: dict[str, list[tuple[str, Change]]] = {}
    for i, prompt in enumerate(prompts):
        if not prompt.stratum:
            continue
        erased = STRATA[prompt.stratum].erased
        shown = {domain: label for domain, label in prompt.labels.items() if label == prompt.about}
        wanted = roles.wanted[prompt.about] if erased else shown
        found.setdefault(prompt.stratum, []).append((prompt.about, change(wanted, [i])))
        if prompt.stratum == "wordings":
            free = [(domain, label) for domain, label in prompt.labels.items() if domain not in wanted]
            found.setdefault("beside", []).extend((domain, change({domain: label}, [i])) for domain, label in free)
    return {key: _stratum(STRATA[key], found[key]) for key in STRATA if key in found}


def _stratum(stratum: Stratum, found: list[tuple[str, Change]]) -> StratumRates:
    changes: dict[str, Change] = {}
    for name, made in found:
        changes[name] = changes[name] + made if name in changes else made
    return StratumRates(stratum, changes, bootstrap_mean([made.lost for _, made in found], seed=0))


def rate(wanted: dict[str, str], images: list[dict[str, str]]) -> Rate:
    """In how many of the images all that is `wanted` was seen, by domain."""
    return Rate(sum(wanted.items() <= seen.items() for seen in images), len(images))


def _sum(changes: list[Change]) -> Change | None:
    if not changes:
        return None
    total, *more = changes
    for change in more:
        total = total + change
    return total
