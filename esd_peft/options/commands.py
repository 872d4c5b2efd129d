"""The package's commands, and the options of each.

Help and mistakes need none of the libraries that compute. So `answer_early` reads the command line while the package is
being imported, before the command imports PyTorch, diffusers and transformers, which takes seconds.
"""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TypeVar

from esd_peft.errors import UserError
from esd_peft.options.base import Options
from esd_peft.options.command_line import parse, run_command
from esd_peft.options.doctor import DoctorConfig
from esd_peft.options.erase import EraseConfig
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.options.merge import MergeConfig
from esd_peft.options.renamed import rename_arguments
from esd_peft.presets import PRESETS

Config = TypeVar("Config", bound=Options)
COMMANDS: dict[str, type[Options]] = {
    "erase": EraseConfig, "merge_adapter": MergeConfig, "evaluate": EvaluateConfig, "doctor": DoctorConfig,
}  # fmt: skip


def read_command_line(kind: type[Config], argv: Sequence[str] | None = None) -> Config:
    """The options that a command was given: `kind` is its class in `COMMANDS`. Raises as `parse` does."""
    name = next(name for name, known in COMMANDS.items() if known is kind)
    words = [*(sys.argv[1:] if argv is None else argv)]
    words = rename_arguments(words) if kind in (EraseConfig, MergeConfig) else words
    return parse(kind, f"python -m esd_peft.{name}", words, PRESETS if kind is EraseConfig else None)


def answer_early(argv: Sequence[str]) -> None:
    """Answer and exit if `argv`, the interpreter's own, is a command that asks for help or has a mistake."""
    if "-m" not in argv[:-1]:
        return
    module, *words = argv[argv.index("-m") + 1 :]
    kind = COMMANDS.get(module.removeprefix("esd_peft."))
    if kind is None or not module.startswith("esd_peft."):
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read_command_line(kind, words)
    except (UserError, SystemExit):
        run_command(lambda: read_command_line(kind, words))
