"""`--push-to-hub`: checks before the work that an upload can succeed, and the upload after it.

The token is the one of `hf auth login` or `HF_TOKEN`, which huggingface_hub finds by itself: no option, file or message here
holds it.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from esd_peft.errors import UserError, one_line
from esd_peft.io.marks import MARK
from esd_peft.io.terminal import say
from esd_peft.options.merge import HubOptions

# the files of use elsewhere; others in an adapter's directory contain local paths
ADAPTER_FILES = ("*.safetensors", "adapter_config.json", "README.md")
_FAILED: tuple[type[Exception], ...] = (errors.HTTPError, OSError, ValueError, RuntimeError)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Repository:
    """The destination of an upload."""

    name: str  # OWNER/NAME
    is_there: bool  # it keeps its visibility

    def upload(self, folder: Path, files: tuple[str, ...] = ()) -> None:
        """Upload the folder, or `files` in it (patterns), and print the address; a new repository is private.

        Raises `UserError` with the command to upload again; the files stay.
        """
        try:
            api = HfApi()
            address = api.create_repo(self.name, private=True, exist_ok=True)
            api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message="Upload with esd_peft",
                allow_patterns=[*files] or None, ignore_patterns=[MARK, f"**/{MARK}"],
            )  # fmt: skip
        except _FAILED as error:
            again = self._command(folder, files)
            raise UserError(f"{folder} is finished, but not uploaded ({one_line(error)}); for that: {again}") from None
        say(f"uploaded to {address}" + ("" if self.is_there else "; it is private until you make it public in its settings"))

    def _command(self, folder: Path, files: tuple[str, ...]) -> str:
        """Return the command of the hub's own tool for the same upload."""
        chosen = [word for file in files for word in ("--include", file)] or ["--exclude", f"*{MARK}"]
        return shlex.join(["hf", "upload", self.name, str(folder), ".", *chosen, "--private"])


def check_upload(options: HubOptions) -> Repository | None:
    """Return the destination of the upload, or None without `--push-to-hub`. Creates nothing on the hub.

    Raises `UserError` without a token that may write, for an invalid name, and for another owner's repository.
    """
    if options.push_to_hub is None:
        return None
    name, api = options.push_to_hub, HfApi()
    try:
        validate_repo_id(name)
        repository = _own(name, api.whoami())
        is_there = api.repo_exists(repository)
    except errors.HFValidationError:
        raise UserError(
            f"--push-to-hub {name!r} is no name of a repository; write OWNER/NAME, of letters, digits, -, _ and ."
        ) from None
    except errors.LocalTokenNotFoundError:
        raise UserError("--push-to-hub needs a token of the hub; run hf auth login, or set HF_TOKEN") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError("--push-to-hub: the hub does not know the token; run hf auth login, or set HF_TOKEN") from None
        raise UserError(f"--push-to-hub: the hub refuses ({one_line(error)}); try again later, or leave it out") from None
    except _FAILED as error:
        raise UserError(f"--push-to-hub: the hub cannot be reached ({one_line(error)}); leave it out") from None
    return Repository(repository, is_there)


def _own(name: str, account: dict[str, Any]) -> str:
    """Return `name` with its owner, the account or its organisation. Raises `UserError` without the right to write."""
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", []))]
    owner, _, repository = name.rpartition("/")
    if owner and owner not in owners:
        raise UserError(f"--push-to-hub {name}: the token is of {', '.join(owners)}; name a repository of theirs")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("--push-to-hub: the token may only read; make one that may write, and run hf auth login")
    return f"{owner or owners[0]}/{repository}"
