"""Models opened as a program of its own opens them, with an environment of its own."""

import os
import subprocess
import sys

OPEN = """
import sys, esd_peft.models as b
from esd_peft.options.model import ModelOptions
from esd_peft.errors import UserError
for model, options in {calls!r}:
    try:
        weights = options.pop("weights", True)
        print(b.open_family(model, options=ModelOptions(**options), weights=weights).path)
    except UserError as error:
        print(error)
"""


def open_in_new_process(calls, **env):
    """Open each (model, options) by `open_family` in a process with that environment: a path or a sentence."""
    code = OPEN.format(calls=calls)
    variables = (
        os.environ | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"} | {k: str(v) for k, v in env.items()}
    )
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls), done.stdout
    return lines
