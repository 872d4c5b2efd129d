"""How often images show what was asked for: the target, the same domain, the other domains (UA, IRA, CRA)."""

from collections.abc import Sequence
from dataclasses import dataclass

from esd_peft.evaluation.intervals import wilson
from esd_peft.evaluation.suites import Prompt, Roles


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
    return Accuracies(targets, others, _sum(rest), domains)


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
