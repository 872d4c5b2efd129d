"""The hub's cache on disk: which directory there is which commit of which repository."""

from pathlib import Path

from esd_peft.io.paths import exists


def commit_of(model: str | None, path: Path) -> str | None:
    """Return the commit of the snapshot `path` of hub id `model`; None for a local model."""
    return path.name if is_snapshot(path) and model is not None and not exists(model) else None


def is_snapshot(path: Path) -> bool:
    """Return whether `path` is models--OWNER--NAME/snapshots/COMMIT, as in the hub's cache."""
    return path.parent.name == "snapshots" and path.parents[1].name.startswith("models--")


def hub_id(path: Path) -> str | None:
    """OWNER/NAME of a snapshot."""
    return path.parents[1].name.removeprefix("models--").replace("--", "/") if is_snapshot(path) else None
