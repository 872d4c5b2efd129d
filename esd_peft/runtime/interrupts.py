"""Signals that end a run (SIGINT, SIGTERM, SIGHUP): at once, or where a loop has nothing half done."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_seen: list[int] | None = None  # within `noted`


class InterruptedBetweenSteps(KeyboardInterrupt):
    """A signal was noted, and this is a place to stop."""


def ended(step: str, kept: bool) -> KeyboardInterrupt:
    """The end of a run after that `step`, which says how to go on where something is `kept`."""
    return KeyboardInterrupt(*([f"after {step}; --resume goes on from there"] if kept else []))


def at_once() -> None:
    """Make every such signal raise `KeyboardInterrupt` from now on, so that drafts are removed."""
    _handle(signal.default_int_handler)


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Collect signals in a list that a loop can read; they also end `distributed.stop_together`.

    A second signal raises `KeyboardInterrupt` immediately.
    """
    global _seen
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before, _seen = _handle(note), seen
    try:
        yield seen
    finally:
        _seen = None
        for number, handler in before.items():
            signal.signal(number, handler)


def noted_so_far() -> list[int] | None:
    """The signals that were noted; none outside of `noted`."""
    return _seen


def _handle(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Install a handler and return the previous ones.

    Ignored signals stay ignored (SIGHUP under nohup). In a thread, and for a handler that was not set from Python and could
    not be restored, nothing changes.
    """
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    try:
        return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}
    except ValueError:  # not in the main thread: the caller handles signals
        return {}
