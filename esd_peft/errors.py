"""The one exception for what a user can mend: its text is one sentence that names the option and the fix."""

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable

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


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written goes away then too
    from esd_peft import distributed  # which raises `UserError` itself

    try:
        distributed.start()
        with contextlib.ExitStack() as stack:
            if not distributed.first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            main()
        distributed.stop()
    except UserError as error:
        if distributed.first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as why:
        if distributed.first_to_fail():
            print(f"interrupted {why}" if why.args else "interrupted: nothing unfinished was kept", file=sys.stderr)
        sys.exit(130)
