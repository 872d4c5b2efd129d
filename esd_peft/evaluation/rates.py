"""Recognition rates of prompted labels: the target, its domain, the other domains (UA, IRA, CRA)."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esd_peft.evaluation.intervals import bootstrap_mean, wilson
from esd_peft.evaluation.prompt_groups import PROMPT_GROUPS, PromptGroup
from esd_peft.evaluation.suites import Roles
from esd_peft.worlds.world import SURE, Prompt


@dataclass(frozen=True)
class Rate:
    """`hits` of `count` images."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval (Wilson)."""
        return wilson(self.hits, self.count)

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.hits + other.hits, self.count + other.count)


@dataclass(frozen=True)
class Change:
    """A rate before and after erasure, with the same prompts and seeds."""

    before: Rate
    after: Rate

    @property
    def lost(self) -> float:
        return self.before.share - self.after.share

    def __add__(self, other: "Change") -> "Change":
        return Change(self.before + other.before, self.after + other.after)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of result.json."""
        return {
            name: {"hits": r.hits, "count": r.count, "share": r.share, "interval": r.interval}
            for name, r in (("before", self.before), ("after", self.after))
        }


Shares = dict[str, dict[str, float]]  # label: {before, after}: share of images


@dataclass(frozen=True)
class Accuracies:
    """After UnlearnCanvas (arXiv 2402.11846): UA = 1 − accuracy on the target, IRA in its domain, CRA in the others.

    There, CRA also counts prompts with the target; here `co_occurring` counts these separately.
    """

    targets: dict[str, Change]  # concept: all of its labels, in prompts with the concept
    others: dict[str, dict[str, Change]]  # domain (the target's first): label: the label, in prompts without a concept
    co_occurring: Change | None  # the other labels, in prompts with a concept
    target_domains: frozenset[str]
    groups: dict[str, "GroupRates"] = field(default_factory=dict)  # by key of the prompt group, if prompts have groups

    @property
    def same_domain(self) -> Change | None:
        return _sum([c for domain, labels in self.others.items() for c in labels.values() if domain in self.target_domains])

    @property
    def cross_domain(self) -> Change | None:
        return _sum(
            [c for domain, labels in self.others.items() for c in labels.values() if domain not in self.target_domains]
        )

    @property
    def others_total(self) -> Change | None:
        """The change over all labels in prompts without a concept."""
        return _sum([c for labels in self.others.values() for c in labels.values()])

    @property
    def shares(self) -> tuple[Shares, Shares]:
        """The shares of concepts, and of all other labels, for the result.json of erase."""
        others = [(label, change) for labels in self.others.values() for label, change in labels.items()]
        concepts, labels = (
            {name: {"before": c.before.share, "after": c.after.share} for name, c in changes}
            for changes in (self.targets.items(), others)
        )
        return concepts, labels


@dataclass(frozen=True)
class GroupRates:
    """Recognition rates of a prompt group."""

    group: PromptGroup
    changes: dict[str, Change]  # by concept, by label, or by domain
    interval: tuple[float, float]  # 95 % interval of `lost` (bootstrap over prompts)

    @property
    def total(self) -> Change:
        """The rates over all images."""
        total, *more = self.changes.values()
        return functools.reduce(Change.__add__, more, total)

    @property
    def worst(self) -> str:
        """The label that loses most; in an erased group the concept with most left."""
        key = (lambda n: self.changes[n].after.share) if self.group.erased else (lambda n: self.changes[n].lost)
        return max(self.changes, key=key)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of result.json."""
        return {
            "title": self.group.title,
            "erased": self.group.erased,
            "seen": self.group.seen,
            **self.total.to_dict(),
            "lost": self.total.lost,
            "lost_interval": self.interval,
            "worst": self.worst,
            "worst_lost": self.changes[self.worst].lost,
            "each": {name: change.to_dict() for name, change in self.changes.items()},
        }


Detections = Sequence[Sequence[dict[str, str]]]  # [prompts][seeds]: labels of an image, by domain


def accuracies(prompts: list[Prompt], roles: Roles, before: Detections, after: Detections) -> Accuracies:
    """Turn the detected labels of each prompt's images, before and after, into rates."""

    def change(labels: dict[str, str], rows: list[int]) -> Change:
        return Change(*(rate(labels, [image for i in rows for image in half[i]]) for half in (before, after)))

    targets = {concept: change(roles.labels[concept], rows) for concept, rows in roles.concept_prompts.items()}
    others: dict[str, dict[str, Change]] = {}
    labels = dict.fromkeys(pair for prompt in prompts for pair in prompt.labels.items())
    for domain, label in labels:
        rows = [i for i in roles.other_prompts if prompts[i].labels.get(domain) == label]
        if rows:
            others.setdefault(domain, {})[label] = change({domain: label}, rows)
    co_occurring = [
        change({domain: label}, [i])
        for concept, rows in roles.concept_prompts.items()
        for i in rows
        for domain, label in prompts[i].labels.items()
        if domain not in roles.labels[concept]
    ]
    domains = frozenset(domain for target in roles.labels.values() for domain in target)
    others = {domain: others[domain] for domain in sorted(others, key=lambda domain: domain not in domains)}
    return Accuracies(targets, others, _sum(co_occurring), domains, _group_rates(prompts, roles, change))


def _group_rates(
    prompts: list[Prompt], roles: Roles, change: Callable[[dict[str, str], list[int]], Change]
) -> dict[str, GroupRates]:
    changes: dict[str, list[tuple[str, Change]]] = {}
    for i, prompt in enumerate(prompts):
        if not prompt.group:
            continue
        erased = PROMPT_GROUPS[prompt.group].erased
        own = {domain: label for domain, label in prompt.labels.items() if label == prompt.subject}
        target = roles.labels[prompt.subject] if erased else own
        if prompt.group == "negative_prompt":
            changes.setdefault("beside_negative", []).extend(
                (domain, change({domain: label}, [i])) for domain, label in prompt.labels.items()
            )
        changes.setdefault(prompt.group, []).append((prompt.subject, change(target, [i])))
        if prompt.group == "paraphrases":
            others = [(domain, label) for domain, label in prompt.labels.items() if domain not in target]
            changes.setdefault("recognisable", []).append((prompt.subject, change(SURE, [i])))
            changes.setdefault("co_occurring", []).extend((domain, change({domain: label}, [i])) for domain, label in others)
    return {key: _rates_of(PROMPT_GROUPS[key], changes[key]) for key in PROMPT_GROUPS if key in changes}


def _rates_of(group: PromptGroup, changes: list[tuple[str, Change]]) -> GroupRates:
    totals: dict[str, Change] = {}
    for name, change in changes:
        totals[name] = totals[name] + change if name in totals else change
    return GroupRates(group, totals, bootstrap_mean([change.lost for _, change in changes], seed=0))


def rate(labels: dict[str, str], images: list[dict[str, str]]) -> Rate:
    """Count the images (their detected labels, by domain) with all of `labels`."""
    return Rate(sum(labels.items() <= detected.items() for detected in images), len(images))


def _sum(changes: list[Change]) -> Change | None:
    if not changes:
        return None
    total, *more = changes
    for change in more:
        total = total + change
    return total
