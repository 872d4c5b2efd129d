"""Error reports of runs with several processes: only the first process to fail reports."""

import os
from typing import Protocol


class Store(Protocol):
    """The key-value store of the processes, outside of collectives."""

    def add(self, key: str, amount: int) -> int:
        """The number under `key`, raised by `amount`. Raises `RuntimeError` if the store is gone."""
        ...


store: Store | None = None  # `distributed.start` sets it where there are several processes


def first_to_fail() -> bool:
    """Return whether no other process has failed before. Call it once."""
    if store is None:
        return True
    try:
        return store.add("esd_peft/failed", 1) == 1
    except RuntimeError:  # the store went with the launcher, or with the first process
        return os.environ.get("RANK") == "0"
    except (
        KeyboardInterrupt
    ):  # the launcher ends this process because another one is gone: reporting twice is better than never
        return True
