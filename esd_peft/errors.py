"""The one exception for what a user can mend: its text is one sentence that names the option and the fix."""

import sys
from collections.abc import Callable

import transformers


class UserError(Exception):
    """Bad input. Commands print the sentence and exit with 2; Python callers catch it."""


def run_command(main: Callable[[], object]) -> None:
    """Run a command's main function; a `UserError` becomes its sentence on stderr and exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing unfinished was kept", file=sys.stderr)
        sys.exit(130)
