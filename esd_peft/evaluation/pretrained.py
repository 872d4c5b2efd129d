"""Models from the hub or a folder."""

from importlib.metadata import version
from typing import Any

from esd_peft.errors import UserError, one_line
from esd_peft.io.paths import is_dir


def load_pretrained(kind: Any, model: str, option: str, **options: Any) -> Any:
    """`kind.from_pretrained(model)`, by hub id or folder. Raises `UserError` naming `option` if that does not work.

    A repository's own code is not run.
    """
    try:
        return kind.from_pretrained(model, trust_remote_code=False, **options)
    except Exception as error:  # transformers and the hub raise many kinds
        fix = "restore the folder" if is_dir(model) else "name a local folder, or a hub id while online"
        raise UserError(f"{option} {model} cannot be loaded ({one_line(error)}); {fix}") from None


def describe_version(model: Any) -> str:
    """The library's version, and the hub's commit where the model came from there."""
    commit: str | None = getattr(model.config, "_commit_hash", None)
    return f"transformers {version('transformers')}" + (f", {commit[:12]}" if commit else "")
