"""Losses and images on a dashboard, through accelerate's trackers."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from esd_peft.errors import UserError


def check_tracker(report_to: str) -> None:
    """Raise `UserError` if what `--report-to` names is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(f"--report-to {report_to} is not installed; pip install {report_to}")


@dataclass
class Dashboard:
    """The dashboard of a run; without trackers it logs nothing."""

    trackers: list[Any] = field(default_factory=list)  # accelerate's `GeneralTracker`

    def log(self, values: dict[str, float], step: int) -> None:
        """The values at a step."""
        for tracker in self.trackers:
            tracker.log(values, step=step)

    def log_images(self, images: Mapping[str, Sequence[Image.Image]], step: int) -> None:
        """At a step, under each name images of one size, in RGB."""
        for tracker in self.trackers:
            pixels = {name: np.stack([np.asarray(image) for image in shown]) for name, shown in images.items()}
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(pixels, step=step, **layout)


@contextlib.contextmanager
def dashboard(report_to: str, config: dict[str, Any]) -> Iterator[Dashboard]:
    """The dashboard that `--report-to` names, beside `config`; all of it is flushed at the end, however that comes."""
    if report_to == "none":
        yield Dashboard()
        return
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=config["device"] == "cpu", log_with=report_to, project_dir="runs")
    flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
    accelerator.init_trackers("esd_peft", config=flat)
    try:
        yield Dashboard(accelerator.trackers)
    finally:
        accelerator.end_training()
