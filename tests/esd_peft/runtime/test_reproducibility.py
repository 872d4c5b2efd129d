"""What the bits of a result depend on is told wherever the package runs."""

from importlib import metadata

import torch

from esd_peft.runtime import reproducibility as module
from esd_peft.runtime.reproducibility import bits_depend_on


def test_versions_of_what_is_installed(monkeypatch):
    there = bits_depend_on(torch.device("cpu"), torch.bfloat16)
    assert there["torch"] == metadata.version("torch") and there["dtype"] == "bfloat16" and "cpu" in there["device"]

    def version(package):
        if package == "bitsandbytes":
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    monkeypatch.setattr(module, "version", version)
    without = bits_depend_on(torch.device("cpu"), torch.bfloat16)
    assert without == there | {"bitsandbytes": "none"}
