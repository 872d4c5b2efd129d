"""Pipelines that ship with the package, each small enough to train on a CPU: the place to see what an erasure does.

A world is a name for `--model`. What is particular to one of them is known here and nowhere else.
"""

from esd_peft.worlds.shapes import Shapes
from esd_peft.worlds.world import World

__all__ = ["WORLDS", "World"]

WORLDS: dict[str, World] = {world.name: world for world in (Shapes(),)}
