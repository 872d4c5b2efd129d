"""Prompt groups of an embedded pipeline: sets of prompts that measure the same thing, seen by the erasure or unseen."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from esd_peft.prompts.plan import mentions, prompts_naming, shares_word
from esd_peft.runtime.seeds import generator
from esd_peft.worlds.world import Labels, Prompt, Sampling, World


@dataclass(frozen=True)
class PromptGroup:
    """A set of prompts that measure the same thing."""

    key: str
    title: str
    erased: bool  # images must not show the concept; those of the other groups must show the same as before
    seen: bool  # in training or in the retain set: its figures do not generalise


PROMPT_GROUPS = {
    group.key: group
    for group in (
        PromptGroup("training", "training prompts", erased=True, seen=True),
        PromptGroup("paraphrases", "paraphrases, unseen contexts", erased=True, seen=False),
        PromptGroup("synonyms", "synonyms and descriptions", erased=True, seen=False),
        PromptGroup("implicit", "implicit (unprompted)", erased=True, seen=False),
        PromptGroup("samplers", "other samplers, steps, guidance scales, negative prompts", erased=True, seen=False),
        PromptGroup("styled", "the name beside a style", erased=True, seen=False),
        PromptGroup("negative_prompt", "the name as negative prompt", erased=True, seen=False),
        PromptGroup("neighbours", "neighbours, not in the retain set", erased=False, seen=False),
        PromptGroup("shared_word", "names that share a word with the concept", erased=False, seen=False),
        PromptGroup("unrelated", "unrelated, not in the retain set", erased=False, seen=False),
        PromptGroup("retain_set", "retain set", erased=False, seen=True),
        PromptGroup("co_occurring", "co-occurring attributes", erased=False, seen=False),
        PromptGroup("beside_negative", "other labels, the name as negative prompt", erased=False, seen=False),
        PromptGroup("recognisable", "images of a thing, for prompts with the concept", erased=False, seen=False),
    )
}
ERASURE_GROUPS = ("paraphrases", "synonyms")  # decide whether a concept is gone
PRESERVATION_GROUPS = ("neighbours", "unrelated")  # decide whether everything else is intact
NEIGHBOURS = 6  # nearest labels of a concept
UNSPECIFIC = ("", "a picture", "a photo", "an image", "a drawing")  # prompts
STRONG_GUIDANCE = 7.5  # with a negative prompt, as people draw: a weak one shows little of its effect


def group_prompts(
    world: World,
    concepts: list[str],
    retain: Iterable[str],
    size: int,
    samplings: Sequence[Sampling] = (),
    seed: int = 0,
) -> list[Prompt]:
    """Draw `size` prompts of each group: per concept for erased groups, over all labels for the others.

    `retain` is the retain set, and `samplings` are the sampler settings of group `samplers`. The prompts depend on `seed`,
    and not on the method of erasure.
    """
    concept_labels = {concept: world.attributes_in(concept) for concept in concepts}
    targets = [pair for labels in concept_labels.values() for pair in labels.items()]
    erased = {*targets}
    retained = _retained_labels(world, retain) - erased
    prompts = [
        dataclasses.replace(prompt, group=key, subject=concept)
        for concept, labels in concept_labels.items()
        for key, members in _concept_prompts(world, concept, labels, size, samplings, erased, seed).items()
        for prompt in members
    ]
    neighbours: dict[tuple[str, str], None] = {}
    for label in targets:
        unlisted = [pair for pair in _nearest(world, label) if pair not in retained | erased]
        neighbours |= dict.fromkeys(unlisted[:NEIGHBOURS])
    every = _every_label(world, erased)
    sharing = [pair for pair in every if pair not in retained and any(shares_word(pair[1], name) for name in concepts)]
    others = [pair for pair in every if pair not in neighbours]
    for key, stream, pairs_of_group in (
        ("neighbours", "neighbours", [*neighbours]),
        ("shared_word", "sharing", sharing),
        ("unrelated", "unlisted", [pair for pair in others if pair not in retained]),
        ("retain_set", "listed", [pair for pair in others if pair in retained]),
    ):
        prompts += _label_prompts(world, key, pairs_of_group, size, erased, generator(seed, f"strata/{stream}"))
    return list({(p.text, p.sampling): p for p in reversed(prompts)}.values())[::-1]  # keep the first of equal prompts


def _concept_prompts(
    world: World,
    concept: str,
    labels: Labels,
    size: int,
    samplings: Sequence[Sampling],
    erased: set[tuple[str, str]],
    seed: int,
) -> dict[str, list[Prompt]]:
    """Return the prompts of a concept, by erased group."""
    draws = generator(seed, f"strata/{concept}")
    by_group = {
        "training": [Prompt(text, world.attributes_in(text)) for text in prompts_naming(concept, world)[:size]],
        "paraphrases": _distinct(world.paraphrases, labels, size, draws),
        "synonyms": _distinct(world.synonyms, labels, size, draws),
        "implicit": _distinct(world.implicit, labels, size, draws),
        "styled": _distinct(world.styled, labels, size, generator(seed, f"strata/{concept}/styled")),
    }
    pairs = zip(by_group["paraphrases"], itertools.cycle(samplings), strict=False) if samplings else ()
    by_group["samplers"] = [dataclasses.replace(prompt, sampling=sampling) for prompt, sampling in pairs]
    # where a negative prompt would show what it does: unspecific prompts, and what resembles the concept
    near = [pair for label in labels.items() for pair in _nearest(world, label)] or _every_label(world, erased)
    unspecific = [Prompt(text) for text in UNSPECIFIC[: max(1, size // 4)]]
    draws, count = generator(seed, f"strata/{concept}/negative"), max(0, size // 2 - len(unspecific))
    negative = Sampling(guidance_scale=STRONG_GUIDANCE, negative_prompt=concept)
    by_group["negative_prompt"] = [
        dataclasses.replace(prompt, sampling=negative)
        for prompt in (*unspecific, *_label_prompts(world, "", near, count, erased, draws))
    ]
    return by_group


def _every_label(world: World, erased: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return all labels that are not erased, with their domains."""
    every = [(domain, label) for domain, labels in world.attributes.items() for label in labels]
    return [pair for pair in every if pair not in erased]


def _retained_labels(world: World, retain: Iterable[str]) -> set[tuple[str, str]]:
    texts = [*retain]
    return {
        (domain, label)
        for domain, labels in world.attributes.items()
        for label in labels
        if any(mentions(label, text) for text in texts)
    }


def _nearest(world: World, label: tuple[str, str]) -> list[tuple[str, str]]:
    """Return the neighbours of a domain's label, nearest first, with their domain."""
    return [(label[0], other) for other in world.neighbours(*label)]


def _distinct(
    sample: Callable[[Labels, int, torch.Generator], list[Prompt]], labels: Labels, size: int, draws: torch.Generator
) -> list[Prompt]:
    """Draw up to `size` prompts with distinct texts."""
    by_text = {prompt.text: prompt for prompt in sample(labels, 4 * size, draws)}
    return [*by_text.values()][:size]


def _label_prompts(
    world: World, key: str, pairs: list[tuple[str, str]], size: int, erased: set[tuple[str, str]], draws: torch.Generator
) -> list[Prompt]:
    """Draw up to `size` prompts that cycle through the labels `pairs`; none asks for an erased label."""
    if not pairs:
        return []
    order = [pairs[i] for i in torch.randperm(len(pairs), generator=draws).tolist()]
    by_text: dict[str, Prompt] = {}
    for turn in range(20 * size):
        domain, label = order[turn % len(order)]
        (prompt,) = world.paraphrases({domain: label}, 1, draws)
        if erased.isdisjoint(prompt.labels.items()):
            by_text.setdefault(prompt.text, dataclasses.replace(prompt, group=key, subject=label))
        if len(by_text) == size:
            break
    return [*by_text.values()]
