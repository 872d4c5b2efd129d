"""What the bits of a result depend on is told wherever the package runs."""

from importlib import metadata

import torch

from esd_peft.runtime import surroundings as module
from esd_peft.runtime.surroundings import surroundings


def test_versions_of_what_is_installed(monkeypatch):
    there = surroundings(torch.device("cpu"), torch.bfloat16)
    assert there["torch"] == metadata.version("torch") and there["dtype"] == "bfloat16" and "cpu" in there["device"]

    def version(package):
        if package == "bitsandbytes":
            raise metadata.PackageNotFoundError(package)
        return metadata.version(package)

    monkeypatch.setattr(module, "version", version)
    without = surroundings(torch.device("cpu"), torch.bfloat16)
    assert without == there | {"bitsandbytes": "none"}
