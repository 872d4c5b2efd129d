"""Of several processes of a run one says why it failed: the first."""

import os
from typing import Protocol


class Store(Protocol):
    """What the processes tell each other outside of collectives."""

    def add(self, key: str, amount: int) -> int:
        """The number under `key`, raised by `amount`. Raises `RuntimeError` if the store is gone."""
        ...


store: Store | None = None  # `distributed.start` sets it where there are several processes


def first_to_fail() -> bool:
    """Whether no other process has failed before: the one that says why. To be asked once."""
    if store is None:
        return True
    try:
        return store.add("esd_peft/failed", 1) == 1
    except RuntimeError:  # the store went with the launcher, or with the first process
        return os.environ.get("RANK") == "0"
    except KeyboardInterrupt:  # the launcher ends this one because another one is gone: rather said twice than never
        return True
