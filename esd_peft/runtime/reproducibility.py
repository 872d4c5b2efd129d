"""Everything besides the config that the bits of a result depend on: versions, device, dtype, threads."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from esd_peft._version import __version__
from esd_peft.runtime.devices import describe_device, is_accelerator

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "bitsandbytes")


def bits_depend_on(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return each by name, to be stored with a result and compared when a run resumes."""
    name = describe_device(device) if is_accelerator(device) else platform.machine()
    versions = {package: installed(package) for package in _PACKAGES}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": f"{device.type} {name}",
        "esd_peft": __version__,
        **versions,
    }


def installed(package: str) -> str:
    """The version of a package, or none: bitsandbytes need not be there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
