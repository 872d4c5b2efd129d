"""Erase a concept from a text-to-image diffusion model for good, and see that it is gone.

    import esd_peft
    result = esd_peft.erase(esd_peft.EraseConfig(concept="circle"))

Light to import: each name below loads its module, and so PyTorch, when it is first used.
"""

import importlib
import logging
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from esd_peft._version import __version__ as __version__

if TYPE_CHECKING:
    from esd_peft.erase import erase as erase
    from esd_peft.evaluate import evaluate as evaluate
    from esd_peft.merge_adapter import merge_adapter as merge_adapter
    from esd_peft.options.erase import EraseConfig as EraseConfig
    from esd_peft.options.evaluate import EvaluateConfig as EvaluateConfig
    from esd_peft.options.merge import MergeConfig as MergeConfig

if sys.argv[:1] == ["-m"]:  # as a command: its output is its own, without the libraries' notices about optional parts
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    importlib.import_module("esd_peft.options.commands").answer_early(sys.orig_argv)

_HOME = {
    "EraseConfig": "options.erase", "MergeConfig": "options.merge", "EvaluateConfig": "options.evaluate",
    "UserError": "errors",
}  # fmt: skip
_JOBS = ("erase", "evaluate", "merge_adapter")  # a function and the module that is its command share the name


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule binds it to its name here; for a job that name is its function.
        if name in _JOBS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME or name in _JOBS:
        return getattr(importlib.import_module(f"esd_peft.{_HOME.get(name, name)}"), name)
    raise AttributeError(f"module 'esd_peft' has no attribute {name!r}")
