"""The loss on a dashboard, through accelerate's trackers."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

from esd_peft.config import EraseConfig
from esd_peft.errors import UserError

Report = Callable[[dict[str, float], int], None]


def check_tracker(config: EraseConfig) -> None:
    """Raise `UserError` if what `config.report_to` names is not installed."""
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"--report-to {config.report_to} is not installed; pip install {config.report_to}")


@contextlib.contextmanager
def tracker(config: EraseConfig) -> Iterator[Report]:
    """A function that logs values at a step; what it logged is flushed at the end, however that comes."""
    if config.report_to == "none":
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=config.device == "cpu", log_with=config.report_to, project_dir="runs")
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.model_dump(mode="json").items()}
    accelerator.init_trackers("esd_peft", config=flat)
    try:
        yield lambda values, step: accelerator.log(values, step=step)
    finally:
        accelerator.end_training()
