"""Views of a run while it trains: losses on a dashboard, and the images of `--validation-prompt`."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from esd_peft.errors import UnusableImages
from esd_peft.evaluation.timeline import BASE, STRENGTHS, Timeline, step_name, strength_name
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.runtime.tracking import Dashboard
from esd_peft.training.student import Student


@dataclass
class Monitor:
    """Logs, and looks at the student every so many steps, if there is a `timeline`: the main process alone has one."""

    student: Student
    profiler: PhaseProfiler
    dashboard: Dashboard = field(default_factory=Dashboard)
    timeline: Timeline | None = None
    every: int | None = None  # steps between two looks

    def log(self, values: dict[str, float], step: int) -> None:
        """The values after so many steps."""
        self.dashboard.log(values, step)

    def look_at_base(self) -> None:
        """Draw the base's images. Raises `UnusableImages` if they show nothing."""
        with self.profiler.phase("evaluate"), self.student.teacher():
            self._look(BASE, 0)

    def look(self, step: int) -> None:
        """Draw the student's images after `step` steps, if they are due; images that show nothing do not stop the run."""
        if step and self.every and step % self.every == 0:
            with self.profiler.phase("evaluate"):
                try:
                    self._look(step_name(step), step)
                except UnusableImages as error:
                    print(f"note: {error}", file=sys.stderr)

    def finish(self, step: int, folder: Path) -> None:
        """Draw the finished student's images, also at lower strengths, and copy all images to `folder` in the output.

        They are copied also if something ends the last ones. Raises `UnusableImages` if one shows nothing.
        """
        if self.timeline is None:
            return
        try:
            self._look(step_name(step), step)
            for strength in STRENGTHS:
                with self.student.scaled(strength):
                    self._look(strength_name(strength))
        finally:
            self.timeline.copy_to(folder, part_of=folder.parent)

    def _look(self, name: str, step: int | None = None) -> None:
        """Draw what is not there yet: a run that is resumed has the rest from before. Strengths have no step to log at."""
        timeline, student = self.timeline, self.student
        if timeline is None or not timeline.missing(name):
            return
        call = "evaluation" if name == BASE else "student evaluation"
        with student.autocast(), self.profiler.drawing(student.denoiser, call, len(timeline.missing(name))):
            images = timeline.draw(student.family.pipeline(student.denoiser, student.device, student.dtype), name)
        if step is not None:
            self.dashboard.log_images({f"validation/{prompt}": shown for prompt, shown in images.items()}, step)
