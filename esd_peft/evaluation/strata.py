"""Prompts by what they measure: what is gone and what is kept, and of both what the erasure has seen, apart."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from esd_peft.prompts.plan import names, prompts_naming
from esd_peft.runtime.seeds import generator
from esd_peft.worlds.world import Labels, Prompt, Sampling, World


@dataclass(frozen=True)
class Stratum:
    """A group of prompts whose figures mean the same."""

    key: str
    title: str
    erased: bool  # its images must not show the concept; those of the others must show what they showed
    seen: bool  # by training, or on a list of what is to be kept: no figure of what the method does elsewhere


STRATA = {
    stratum.key: stratum
    for stratum in (
        Stratum("trained", "its name, in prompts like those of training", erased=True, seen=True),
        Stratum("wordings", "its name, in other wordings and contexts", erased=True, seen=False),
        Stratum("synonyms", "other names and descriptions", erased=True, seen=False),
        Stratum("unnamed", "prompts that do not name it", erased=True, seen=False),
        Stratum("sampling", "other samplers, steps, guidance scales and negative prompts", erased=True, seen=False),
        Stratum("neighbours", "neighbours that are on no list", erased=False, seen=False),
        Stratum("unlisted", "everything else that is on no list", erased=False, seen=False),
        Stratum("listed", "what is on the list to be kept", erased=False, seen=True),
        Stratum("beside", "what else prompts with its name ask for", erased=False, seen=False),
    )
}
ASKING = ("wordings", "synonyms")  # the strata by which a concept counts as gone
KEPT = ("neighbours", "unlisted")  # and those by which the rest counts as intact
NEIGHBOURS = 6  # labels that count as near to a concept


def strata_prompts(
    world: World,
    concepts: list[str],
    retain: Iterable[str],
    size: int,
    samplings: Sequence[Sampling] = (),
    seed: int = 0,
) -> list[Prompt]:
    """`size` prompts of each stratum, of each concept or of all that is kept; `retain` is the list to be kept.

    `samplings` are other ways to draw than the usual one. All depends on the seed alone, not on how something is erased.
    """
    wanted = {concept: world.attributes_in(concept) for concept in concepts}
    erased = {pair for labels in wanted.values() for pair in labels.items()}
    listed = _listed(world, retain) - erased
    near: dict[tuple[str, str], None] = {}
    prompts: list[Prompt] = []
    for concept, labels in wanted.items():
        draws = generator(seed, f"strata/{concept}")
        made = {
            "trained": [Prompt(text, world.attributes_in(text)) for text in prompts_naming(concept, world)[:size]],
            "wordings": _distinct(world.named, labels, size, draws),
            "synonyms": _distinct(world.described, labels, size, draws),
            "unnamed": _distinct(world.unnamed, labels, size, draws),
        }
        other = zip(made["wordings"], itertools.cycle(samplings), strict=False) if samplings else ()
        made["sampling"] = [dataclasses.replace(prompt, sampling=sampling) for prompt, sampling in other]
        for key, found in made.items():
            prompts += [dataclasses.replace(prompt, stratum=key, about=concept) for prompt in found]
        for domain, label in labels.items():
            pairs = [(domain, other) for other in world.neighbours(domain, label)]
            near |= dict.fromkeys([pair for pair in pairs if pair not in listed | erased][:NEIGHBOURS])
    rest = [(domain, label) for domain, labels in world.attributes.items() for label in labels]
    rest = [pair for pair in rest if pair not in erased and pair not in near]
    groups = {
        "neighbours": [*near],
        "unlisted": [pair for pair in rest if pair not in listed],
        "listed": [pair for pair in rest if pair in listed],
    }
    for key, pairs in groups.items():
        prompts += _of_labels(world, key, pairs, size, erased, generator(seed, f"strata/{key}"))
    return list({(p.text, p.sampling): p for p in reversed(prompts)}.values())[::-1]  # the first of a text counts


def _listed(world: World, retain: Iterable[str]) -> set[tuple[str, str]]:
    texts = [*retain]
    return {
        (domain, label)
        for domain, labels in world.attributes.items()
        for label in labels
        if any(names(label, text) for text in texts)
    }


def _distinct(
    draw: Callable[[Labels, int, torch.Generator], list[Prompt]], labels: Labels, size: int, draws: torch.Generator
) -> list[Prompt]:
    """`size` prompts of different texts, or as many as there are."""
    found = {prompt.text: prompt for prompt in draw(labels, 4 * size, draws)}
    return [*found.values()][:size]


def _of_labels(
    world: World, key: str, pairs: list[tuple[str, str]], size: int, erased: set[tuple[str, str]], draws: torch.Generator
) -> list[Prompt]:
    """`size` prompts, of the labels by turns, none of which asks for what is erased."""
    if not pairs:
        return []
    order = [pairs[i] for i in torch.randperm(len(pairs), generator=draws).tolist()]
    made: dict[str, Prompt] = {}
    for turn in range(20 * size):
        domain, label = order[turn % len(order)]
        (prompt,) = world.named({domain: label}, 1, draws)
        if erased.isdisjoint(prompt.labels.items()):
            made.setdefault(prompt.text, dataclasses.replace(prompt, stratum=key, about=label))
        if len(made) == size:
            break
    return [*made.values()]
