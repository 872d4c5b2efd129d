"""Before/after rates on the embedded pipeline: how often its classifier sees what a prompt names."""

from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.shapes import world
from esd_peft.shapes.classifier import Classifier


def check_concepts(concepts: list[str]) -> None:
    """Raise `UserError` for a concept that names no shape, colour or texture: its erasure could not be seen."""
    for concept in concepts:
        if not world.attributes_in(concept):
            known = ", ".join(word for values in world.ATTRIBUTES.values() for word in values)
            raise UserError(f"--concept {concept!r} names nothing the embedded pipeline draws; it draws {known}")


def judged_prompts(concepts: list[str]) -> list[str]:
    """Each concept alone in every wording of the training captions, then every full prompt of the world."""
    alone = [world.prompt(world.attributes_in(c), template) for c in concepts for template in world.TEMPLATES]
    return list(dict.fromkeys(alone)) + world.full_prompts()


def shown_prompts(concepts: list[str], prompts: list[str]) -> list[int]:
    """Which of `prompts` go into the grid: each concept alone, in a few full prompts, and a few that do not name it."""
    named = [i for i, p in enumerate(prompts) if _concepts_in(p, concepts)]
    free = [i for i, p in enumerate(prompts) if not _concepts_in(p, concepts)]
    step = 29  # prime to the 144 full prompts: consecutive picks differ in shape, colour and texture
    few = [named[(7 + k * step) % len(named)] for k in range(3)] + [
        free[(k * step) % len(free)] for k in range(6 if free else 0)
    ]
    alone = [prompts.index(world.prompt(world.attributes_in(c), "a {}")) for c in concepts]
    return list(dict.fromkeys(alone + few))


def recognition(
    classifier: Classifier, prompts: list[str], pictures: Tensor, concepts: list[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of pictures `[prompts, seeds, 3, 32, 32]` in which the classifier sees what the prompt names.

    Returns:
        For each concept, over the prompts that name it: the share that shows all of it.
        For every attribute, over the full prompts that name it and no concept: the share that shows it.
    """
    seeds = pictures.shape[1]
    seen = classifier.name(pictures.flatten(0, 1))
    full = set(world.full_prompts())

    def rate(wanted: dict[str, str], rows: list[int]) -> float:
        hits = [wanted.items() <= seen[i * seeds + k].items() for i in rows for k in range(seeds)]
        return sum(hits) / len(hits)

    erased = {c: rate(world.attributes_in(c), _naming(c, prompts)) for c in concepts}
    free = [i for i, p in enumerate(prompts) if p in full and not _concepts_in(p, concepts)]
    others = {}
    for kind, values in world.ATTRIBUTES.items():
        for value in values:
            rows = [i for i in free if world.attributes_in(prompts[i])[kind] == value]
            if rows:
                others[value] = rate({kind: value}, rows)
    return erased, others


def _naming(concept: str, prompts: list[str]) -> list[int]:
    return [i for i, p in enumerate(prompts) if _concepts_in(p, [concept])]


def _concepts_in(text: str, concepts: list[str]) -> list[str]:
    named = world.attributes_in(text).items()
    return [c for c in concepts if world.attributes_in(c).items() <= named]
