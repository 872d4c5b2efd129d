"""Presets of `--preset NAME`: names of a kind of concept, its anchor, and neighbours to preserve.

Each is a YAML file of options, like any config; its first lines name the source of its words.
"""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))
PRESETS = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}  # by name
