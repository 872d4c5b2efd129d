"""Once more with less, where the device ran out of memory."""

import sys
from collections.abc import Callable
from typing import TypeVar

from esd_peft.erasure.planner import MemoryEstimator, smaller
from esd_peft.errors import OutOfMemory
from esd_peft.models import ModelFamily
from esd_peft.options.base import flag
from esd_peft.options.erase import EraseConfig
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import release

Result = TypeVar("Result")
_LESS_MEMORY = "plan for less with --memory-budget, or add --quantize nf4 or --offload, or take a smaller model"


def with_less_memory(
    run: Callable[[EraseConfig], Result],
    given: EraseConfig,
    resolved: EraseConfig,
    prompts: PromptPlan,
    family: ModelFamily,
    restart_with: Callable[[EraseConfig], EraseConfig],
) -> Result:
    """Return `run` of the `resolved` config, or of one that takes less memory if it runs out of it, and note that on stderr.

    `restart_with` says with what config the second run starts. Raises `OutOfMemory` if nothing less is possible, or with
    several processes: the others would have to start anew with it.
    """
    try:
        try:
            return run(resolved)
        except OutOfMemory as error:
            phase = error.phase
        # what the run held is free only here: the error's traceback led to it
        release(resolved.runtime.torch_device)
        return run(restart_with(_smaller(given, resolved, prompts, family, phase)))
    except OutOfMemory as error:
        raise OutOfMemory(error.phase, _LESS_MEMORY) from None


def _smaller(given: EraseConfig, used: EraseConfig, prompts: PromptPlan, family: ModelFamily, phase: str) -> EraseConfig:
    found = None
    if distributed.world_size() == 1:
        found = smaller(MemoryEstimator(used, prompts, family), given, used, phase)
    if found is None:
        raise OutOfMemory(phase)
    before, after = used.flat(), found.flat()
    changed = {flag(name): value for name, value in after.items() if value != before[name]}
    said = ", ".join(option if value is True else f"{option} {value}" for option, value in changed.items())
    print(f"note: the device ran out of memory in {phase}; once more with {said}", file=sys.stderr)
    return found
