"""What `--preset NAME` sets: for a kind of concept its names, what it becomes, and what is near it and must stay.

Each is a YAML file of options like any other config, whose first lines say where its words come from.
"""

from importlib.resources import files
from pathlib import Path

_FOLDER = Path(str(files(__name__)))
PRESETS = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}  # by name
