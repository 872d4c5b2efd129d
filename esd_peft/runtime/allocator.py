"""Settings of PyTorch's GPU memory allocator, which reads the environment once."""

import os
import platform
import sys

from esd_peft.errors import one_line

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_SEGMENTS = "expandable_segments:True"


def avoid_gaps() -> None:
    """Set PyTorch's GPU allocator to expandable segments, which avoids fragmentation. Call it before the first use of the
    GPU.

    The user's own allocator settings stay. Does nothing under WSL2, where the first allocation fails with it on many
    drivers (github.com/pytorch/pytorch/issues/192330).
    """
    under_wsl = "microsoft" in platform.release().lower()
    if sys.platform == "linux" and not under_wsl and not {*_NAMES} & os.environ.keys():
        os.environ[_NAMES[0]] = _SEGMENTS


def refused_by_driver(error: BaseException) -> str | None:
    """Return a sentence that names the variable if the driver refuses expandable segments; None for other errors."""
    name = next((name for name in _NAMES if _SEGMENTS in os.environ.get(name, "")), None)
    if name is None or "CUDA driver error" not in str(error):
        return None
    fix = os.environ[name].replace(_SEGMENTS, "expandable_segments:False")
    return f"the GPU's driver fails ({one_line(error)}), as some do with {name}={os.environ[name]}; set {name}={fix}"
