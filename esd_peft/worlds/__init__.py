"""Pipelines that ship with the package, each small enough to train on a CPU: the place to see what an erasure does.

A world is a name for `--model`. What is particular to one of them is known here and nowhere else.
"""

from pathlib import Path

from esd_peft.worlds.emoji import Emoji
from esd_peft.worlds.shapes import Shapes
from esd_peft.worlds.world import World

__all__ = ["WORLDS", "World", "find_world"]

WORLDS: dict[str, World] = {world.name: world for world in (Shapes(), Emoji())}


def find_world(model: str) -> World | None:
    """The world that `model` names, by its name or by the directory of its pipeline."""
    places = {world.pipeline.resolve(): world for world in WORLDS.values()}
    return WORLDS.get(model) or places.get(Path(model).resolve())
