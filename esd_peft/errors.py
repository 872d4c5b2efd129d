"""The one exception for what a user can mend: its text is one sentence that names the option and the fix."""

import signal
import sys
from collections.abc import Callable

import transformers


class UserError(Exception):
    """Bad input. Commands print the sentence and exit with 2; Python callers catch it."""

    def __init__(self, sentence: str) -> None:
        """One line, whatever the names and files hold that it quotes."""
        super().__init__("".join(char if char.isprintable() else " " for char in sentence))


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written goes away then too
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as why:
        print(f"interrupted {why}" if why.args else "interrupted: nothing unfinished was kept", file=sys.stderr)
        sys.exit(130)
