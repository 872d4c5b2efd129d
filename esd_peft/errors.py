"""The one exception for what a user can mend: its text is one sentence that names the option and the fix."""

import os
import re
import sys
from collections.abc import Callable

import torch
import transformers

_TOKEN = re.compile(r"\b(hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}")  # of the hub

_LONG = 2000  # characters; more than that is a file's


class UserError(Exception):
    """Bad input. Commands print the sentence and exit with 2; Python callers catch it."""

    def __init__(self, sentence: str) -> None:
        """One line without the hub's token, whatever the names, files and libraries hold that it quotes."""
        sentence = _TOKEN.sub("***", sentence)
        if secret := os.environ.get("HF_TOKEN"):
            sentence = sentence.replace(secret, "***")
        super().__init__("".join(char if char.isprintable() else " " for char in sentence[:_LONG]))


class OutOfMemory(UserError):
    """The device has too little memory for a phase of a job (`esd_peft.phases`)."""

    def __init__(self, phase: str, advice: str = "take smaller batches, or add --quantize nf4") -> None:
        super().__init__(f"the device ran out of memory in {phase}; {advice}")
        self.phase = phase


def in_brief(error: BaseException) -> str:
    """What another library's error says, on one line, of no more than a sentence can quote; its class if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def system_reason(error: BaseException) -> str:
    """What the system has against a file: without its number and name, if it says so."""
    return str(getattr(error, "strerror", None) or error)


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the GPU or the host has too little memory; PyTorch has no class of its own for the latter."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2, and so does too little
    memory."""
    transformers.utils.logging.disable_progress_bar()
    from esd_peft import distributed, interrupts, terminal  # which raise `UserError` themselves

    interrupts.at_once()
    try:
        with terminal.forgiving_streams():
            main()
        return
    except UserError as error:
        said, code = f"error: {error}", 2
    except KeyboardInterrupt as why:
        said, code = f"interrupted {why}" if why.args else "interrupted: nothing unfinished was kept", 130
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said, code = "error: this machine has too little memory for that; take smaller numbers or a smaller model", 2
    if distributed.first_to_fail():
        with terminal.forgiving_streams():
            print(said, file=sys.stderr)
    sys.exit(code)
