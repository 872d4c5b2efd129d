"""The surroundings of an erasure: one job at a time, processes, checks, defaults, checkpoints, a retry with less memory."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from esd_peft.adapters.hub import check_upload
from esd_peft.erasure import summary
from esd_peft.erasure.checks import check_environment, check_model, check_words
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import MEMORY_SETTINGS, given_settings, within_budget
from esd_peft.erasure.retry import with_less_memory
from esd_peft.io.jobs import lock_output, only_job
from esd_peft.models import ModelFamily, open_family
from esd_peft.options.erase import EraseConfig
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime import distributed, interrupts
from esd_peft.runtime.devices import current, resolve_device
from esd_peft.runtime.reproducibility import bits_depend_on
from esd_peft.runtime.tracking import Dashboard, dashboard
from esd_peft.training.checkpoint import Checkpoints


@dataclass
class Session:
    """The inputs of a training beside its config."""

    family: ModelFamily
    prompts: PromptPlan
    denoiser_sha256: dict[str, str]  # of the denoiser's files
    checkpoints: Checkpoints | None = None  # of the main process, the only one that writes
    dashboard: Dashboard = field(default_factory=Dashboard)


Train = Callable[[EraseConfig, Session], dict[str, Any]]  # `esd_peft.erase.train`: returns what `result.json` holds


def in_session(given: EraseConfig, train: Train) -> dict[str, Any]:
    """Return `train` of the resolved config.

    Raises `UserError` for input that cannot work, before any work where that can be known.
    """
    with only_job():
        distributed.start()
        device = resolve_device(given.runtime.device)
        output, is_main = given.checkpoint.output, distributed.is_main_process()
        with lock_output(output) if is_main else contextlib.nullcontext(), current(device):
            repository = check_upload(given.hub) if is_main else None
            result = _train(given, train, device)
            if repository is not None:
                summary.upload(given, repository)
    return result


def _train(given: EraseConfig, train: Train, device: torch.device) -> dict[str, Any]:
    check_environment(given, device)
    family = open_family(given.pretrained.model, options=given.pretrained)
    check_words(given.prompts, given.validation.validation_prompt, family)
    config, prompts = resolve(given, family)
    config = within_budget(given, config, prompts, family)
    check_model(config, prompts, family)
    session = Session(family, prompts, family.denoiser_hashes())

    def run(config: EraseConfig) -> dict[str, Any]:
        with dashboard(config.runtime.report_to, config.flat()) as session.dashboard:
            return train(config, session)

    if not distributed.is_main_process():
        config = distributed.broadcast(None)  # the main process's, but for the device
        quiet = config.replace(device=str(device), num_validation_images=0, validation_prompt=[], report_to="none")
        return with_less_memory(run, given, quiet, prompts, family, lambda less: less)
    made_with = bits_depend_on(device, config.runtime.torch_dtype)
    with Checkpoints(config.checkpoint, config.flat(), session.denoiser_sha256, made_with) as checkpoints:
        session.checkpoints = checkpoints
        if config.checkpoint.resume:  # with the memory settings that the run had come to, where none are given
            left = checkpoints.settings_left(MEMORY_SETTINGS)
            config = config.replace(**{name: left[name] for name in left.keys() - given_settings(given)})
            checkpoints.goes_on_with(config.flat())
        config = distributed.broadcast(config)

        def restart_with(less: EraseConfig) -> EraseConfig:
            return less.replace(resume=checkpoints.restart_with(less.flat()))

        try:
            return with_less_memory(run, given, config, prompts, family, restart_with)
        except KeyboardInterrupt as stop:
            if stop.args or checkpoints.step is None:
                raise
            raise interrupts.ended(f"step {checkpoints.step}", kept=True) from None
