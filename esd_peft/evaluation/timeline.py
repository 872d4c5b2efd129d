"""The images of `--validation-prompt`: a folder for each snapshot of the student, and a page with all of them.

    validation/report.html
    validation/prompts.json                           prompts and seed
    validation/base/prompt_0_image_0.png              the model before
    validation/step_000100/prompt_0_image_0.png       the student after 100 steps; the last snapshot is the adapter
    validation/strength_0.5/prompt_0_image_0.png      the finished adapter at half strength

Image k of a prompt starts from the same noise in all of them. The folder lies in `OUTPUT.checkpoint`, since the output
appears only when it is whole, and is copied from there: whatever ends the run, one that is resumed goes on with all looks.
It may look at other prompts, which get the next numbers.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from esd_peft.evaluation import pages
from esd_peft.io import marks
from esd_peft.io.outputs import check_output, empty_folder, new_directory, new_file, take_folder
from esd_peft.io.paths import is_dir
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.sampling import EncodedPrompts, SampleIndex, check_images, image_batches, to_image

FOLDER, PAGE, RECORD = "validation", "report.html", "prompts.json"
BASE = "base"
STRENGTHS = (0.5, 1.5)  # of the finished adapter, besides 0, the base, and 1
_SNAPSHOTS, _SNAPSHOT = (
    "the images of --validation-prompt",
    "a snapshot of --validation-prompt",
)  # kinds of the folders, as recorded in their marks


def step_name(step: int) -> str:
    """Return the name of the snapshot after `step` steps."""
    return f"step_{step:06d}"


def strength_name(strength: float) -> str:
    """Return the name of the snapshot of the finished adapter at `strength`."""
    return f"strength_{strength:g}"


@dataclass
class Timeline:
    """Validation snapshots of a model, each of the same images. A snapshot appears as a whole or not at all."""

    folder: Path
    prompts: Sequence[str]  # of this run
    images: int  # of each prompt
    seed: int
    batch_size: int
    encoded: EncodedPrompts | None  # None without prompts: snapshots of the resumed run stay
    title: str  # of the page
    all_prompts: list[str] = field(default_factory=list)  # prompts of all snapshots, by index
    stale: set[str] = field(default_factory=set)  # snapshots after the checkpoint, which are drawn again

    @property
    def page(self) -> Path:
        """The page with all snapshots."""
        return self.folder / PAGE

    def open(self, last_step: int | None) -> None:
        """Start, or continue from `last_step` with the existing snapshots."""
        record = self.folder / RECORD
        try:
            before = read_json(record) if last_step is not None else {}
            self.all_prompts = [str(prompt) for prompt in before["prompts"]] if before.get("seed") == self.seed else []
        except (UnreadableError, KeyError, TypeError, AttributeError):
            self.all_prompts = []
        if is_dir(self.folder) and not self.all_prompts:
            empty_folder(self.folder, _SNAPSHOTS)
        take_folder(self.folder, _SNAPSHOTS, part_of=self.folder.parent)
        self.all_prompts += [prompt for prompt in dict.fromkeys(self.prompts) if prompt not in self.all_prompts]
        if self.encoded is not None:
            self.encoded.rows = {number: self.prompts.index(self.all_prompts[number]) for number in self._numbers()}
        with new_file(record) as draft:
            made_with = {"prompts": self.all_prompts, "seed": self.seed}
            draft.write_text(json.dumps(made_with, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.stale = {step_name(step) for step in self.steps() if step > (last_step or 0)}
        for name in (BASE, *map(step_name, self.steps())):
            check_output(self.folder / name, _SNAPSHOT, overwrite=True)

    def steps(self) -> list[int]:
        """The steps with a snapshot, in order."""
        names = [re.fullmatch(r"step_(\d{6,})", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in names if match)

    def missing(self, name: str) -> list[SampleIndex]:
        """Return the images, by prompt and seed index, that the snapshot lacks."""
        existing = {*self._files(name)} if name not in self.stale else set()
        places = [(number, k) for number in self._numbers() for k in range(self.images)]
        return [place for place in places if _file(place) not in existing]

    def draw(self, pipe: DiffusionPipeline, name: str) -> dict[str, list[Image.Image]]:
        """Draw the missing images of a snapshot, save them, and return them by prompt.

        Raises `UnusableImages` if they show nothing; then nothing is added.
        """
        drawn: dict[SampleIndex, Image.Image] = {}
        assert self.encoded is not None, "nothing is missing without prompts"
        for batch, pixels in image_batches(pipe, self.encoded, self.missing(name), self.batch_size, self.seed, name):
            drawn |= {place: to_image(image) for place, image in zip(batch, pixels, strict=True)}
        check_images(drawn.values(), name)
        look = self.folder / name
        with new_directory(look, _SNAPSHOT, overwrite=True, part_of=self.folder) as draft:
            for file in self._files(name):
                shutil.copyfile(look / file, draft / file)
            for place, image in drawn.items():
                image.save(draft / _file(place))
        self.stale.discard(name)
        self.write_page()
        by_prompt: dict[str, list[Image.Image]] = {}
        for place, image in drawn.items():
            by_prompt.setdefault(self.all_prompts[place[0]], []).append(image)
        return by_prompt

    def copy_to(self, folder: Path, part_of: Path) -> None:
        """Copy all snapshots and the page into the output."""
        self.write_page()
        with new_directory(folder, _SNAPSHOTS, overwrite=True, part_of=part_of) as draft:
            for name in (BASE, *map(step_name, self.steps()), *map(strength_name, STRENGTHS)):
                for file in self._files(name):
                    (draft / name).mkdir(exist_ok=True)
                    shutil.copyfile(self.folder / name / file, draft / name / file)
            for file in (RECORD, PAGE):
                shutil.copyfile(self.folder / file, draft / file)

    def write_page(self) -> None:
        """Write the page: base and steps by prompt, then strengths."""
        steps = self.steps()
        along = [("base", BASE), *((f"step {step:,}", step_name(step)) for step in steps)]
        strip: list[tuple[str, str]] = []
        if steps and all(self._files(strength_name(strength)) for strength in STRENGTHS):
            by_strength = {0.0: BASE, 1.0: step_name(steps[-1])} | {s: strength_name(s) for s in STRENGTHS}
            strip = [(f"{strength:g}", by_strength[strength]) for strength in sorted(by_strength)]
        files = {name: self._files(name) for _, name in (*along, *strip)}
        page = pages.render(
            "timeline.html", title=self.title, prompts=self.all_prompts, along=along, strip=strip, files=files
        )
        with new_file(self.page) as draft:
            draft.write_text(page, encoding="utf-8")

    def _numbers(self) -> list[int]:
        """Return the indices of the prompts to draw."""
        return [self.all_prompts.index(prompt) for prompt in dict.fromkeys(self.prompts)]

    def _files(self, name: str) -> list[str]:
        """Return the image files of a snapshot, in order; none if it does not exist."""
        return sorted(marks.recorded(self.folder / name) or (), key=lambda file: [*map(int, re.findall(r"\d+", file))])


def _file(place: SampleIndex) -> str:
    return f"prompt_{place[0]}_image_{place[1]}.png"
