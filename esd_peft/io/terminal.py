"""Standard output and error of commands: a closed or broken stream does not end the command."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from esd_peft.errors import UserError
from esd_peft.io.text import printable_lines


class _Stream:
    """A text stream that takes every character, and whose reader may leave (`| head`)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            encoding = self._stream.encoding or "utf-8"
            self._try(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError as error:
            self.failure = error
            with contextlib.suppress(OSError, ValueError):  # what is in its buffer is written at the end, and goes nowhere
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Silence exceptions of `sys.stdout` and `sys.stderr` inside the block.

    Raises `UserError` at the end if standard output could not be written, but for a reader that left.
    """
    streams = sys.stdout, sys.stderr
    out, err = (_Stream(stream) if stream is not None else None for stream in streams)
    sys.stdout, sys.stderr = out, err
    try:
        yield
        if out is not None:
            out.flush()
            if out.failure is not None and not isinstance(out.failure, BrokenPipeError):
                raise UserError(f"standard output cannot be written: {out.failure.strerror}; all else is done")
    finally:
        sys.stdout, sys.stderr = streams


def say(text: str) -> None:
    """Print `text`, with names that others chose: what a terminal would obey, but for ends of lines, is escaped."""
    print(printable_lines(text))
