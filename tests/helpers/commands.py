"""Commands as processes of their own, forked from one that has imported the package: importing it takes longer than most of
what they are asked to do. That a fresh Python runs them as well is what `.ci/run` and a few tests show.
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from esd_peft.options.command_line import run_command
from esd_peft.training import checkpoint
from runs import few_prompts, shorten

COMMANDS = ("erase", "evaluate", "merge_adapter", "study.__main__")


@dataclass
class Done:
    """What a command left, named as `subprocess.run` names it."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """`python -m esd_peft.NAME ARGUMENTS`, which has begun, in `cwd` and with `env` added to the environment."""

    def __init__(self, name: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([f"esd_peft.{command}" for command in COMMANDS])
        self._folder = tempfile.TemporaryDirectory()
        self.files = [Path(self._folder.name) / stream for stream in ("stdout", "stderr")]
        for file in self.files:
            file.touch()
        given = ([name, *map(str, arguments)], cwd or Path.cwd(), os.environ | (env or {}), self.files)
        self.process = context.Process(target=_run, args=given)
        self.process.start()

    def send_signal(self, number: int) -> None:
        """As to any process."""
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 120) -> Done:
        """Its end. Raises `TimeoutError`, once it is killed, if that does not come in so many seconds."""
        self.process.join(timeout)
        code, said = self.process.exitcode, [file.read_text(encoding="utf-8") for file in self.files]
        if code is None:
            self.process.kill()
            raise TimeoutError(said[1])
        self._folder.cleanup()
        return Done(code, *said)


def run(name: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """What a `Command` leaves."""
    return Command(name, *arguments, cwd=cwd, env=env).wait()


def _run(words: list[str], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    checkpoint.SECONDS = 0.0  # a checkpoint after each step: runs are short
    few_prompts(setattr)
    shorten(setattr)
    run_command(importlib.import_module(f"esd_peft.{words[0]}").main)
