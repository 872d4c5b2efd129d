"""How PyTorch shares out a GPU's memory, which it asks the environment once."""

import os
import platform
import sys

from esd_peft.errors import in_brief

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS = "expandable_segments:True"


def avoid_gaps() -> None:
    """Let PyTorch's allocator for GPUs extend what it holds instead of taking ever new pieces, which leaves gaps; call it
    before the GPU is first used. What the user has set for the allocator stays.

    Not under WSL2, where the first allocation fails with it on many drivers (github.com/pytorch/pytorch/issues/192330).
    """
    under_wsl = "microsoft" in platform.release().lower()
    if sys.platform == "linux" and not under_wsl and not {*_NAMES} & os.environ.keys():
        os.environ[_NAMES[0]] = _SEGMENTS


def refused_by_driver(error: BaseException) -> str | None:
    """A sentence that names the variable, if the driver has refused what extending asks of it; none for other errors."""
    name = next((name for name in _NAMES if _SEGMENTS in os.environ.get(name, "")), None)
    if name is None or "CUDA driver error" not in str(error):
        return None
    fix = os.environ[name].replace(_SEGMENTS, "expandable_segments:False")
    return f"the GPU's driver fails ({in_brief(error)}), as some do with {name}={os.environ[name]}; set {name}={fix}"
