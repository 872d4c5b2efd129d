"""The loss on a dashboard, through accelerate's trackers."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from esd_peft.errors import UserError

Report = Callable[[dict[str, float], int], None]


def check_tracker(report_to: str) -> None:
    """Raise `UserError` if what `--report-to` names is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report-to {report_to} is not installed; pip install {report_to}")


@contextlib.contextmanager
def tracker(report_to: str, config: dict[str, Any]) -> Iterator[Report]:
    """A function that logs values at a step, beside `config`; all of it is flushed at the end, however that comes."""
    if report_to == "none":
        yield lambda values, step: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=config["device"] == "cpu", log_with=report_to, project_dir="runs")
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    accelerator.init_trackers("esd_peft", config=flat)
    try:
        yield lambda values, step: accelerator.log(values, step=step)
    finally:
        accelerator.end_training()
