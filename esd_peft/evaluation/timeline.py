"""The images of `--validation-prompt`: a folder for each look at the student, and a page of them all.

    validation/report.html
    validation/prompts.json                           which prompts, and from which seed
    validation/base/prompt_0_image_0.png              the model before
    validation/step_000100/prompt_0_image_0.png       the student after so many steps, the last of which made the adapter
    validation/strength_0.5/prompt_0_image_0.png      the finished adapter, counted half

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
STRENGTHS = (0.5, 1.5)  # of the finished adapter, beside 0, which is the base, and 1
_LOOKS, _LOOK = "the images of --validation-prompt", "a look at --validation-prompt"  # what the folders are


def step_name(step: int) -> str:
    """The look after so many steps."""
    return f"step_{step:06d}"


def strength_name(strength: float) -> str:
    """The look at the finished adapter, of which so much counts."""
    return f"strength_{strength:g}"


@dataclass
class Timeline:
    """Looks at a model, each of which has the same images. They are made, and appear, whole or not at all."""

    folder: Path
    prompts: Sequence[str]  # to look at from now on
    images: int  # of each prompt
    seed: int
    batch_size: int
    encoded: EncodedPrompts | None  # none without prompts: the looks of the run that is resumed are kept
    title: str  # of the page
    known: list[str] = field(default_factory=list)  # all prompts ever looked at, by their numbers
    again: set[str] = field(default_factory=set)  # looks from after the checkpoint, of another student if a bit differs

    @property
    def page(self) -> Path:
        """Shows all looks so far."""
        return self.folder / PAGE

    def open(self, last_step: int | None) -> None:
        """Start; or go on from `last_step`, with all looks that the run has left."""
        record = self.folder / RECORD
        try:
            before = read_json(record) if last_step is not None else {}
            self.known = [str(prompt) for prompt in before["prompts"]] if before.get("seed") == self.seed else []
        except (UnreadableError, KeyError, TypeError, AttributeError):
            self.known = []
        if is_dir(self.folder) and not self.known:
            empty_folder(self.folder, _LOOKS)
        take_folder(self.folder, _LOOKS, part_of=self.folder.parent)
        self.known += [prompt for prompt in dict.fromkeys(self.prompts) if prompt not in self.known]
        if self.encoded is not None:
            self.encoded.rows = {number: self.prompts.index(self.known[number]) for number in self._numbers()}
        with new_file(record) as draft:
            made_with = {"prompts": self.known, "seed": self.seed}
            draft.write_text(json.dumps(made_with, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.again = {step_name(step) for step in self.steps() if step > (last_step or 0)}
        for name in (BASE, *map(step_name, self.steps())):
            check_output(self.folder / name, _LOOK, overwrite=True)

    def steps(self) -> list[int]:
        """Those that were looked at, in order."""
        names = [re.fullmatch(r"step_(\d{6,})", path.name) for path in self.folder.iterdir()]
        return sorted(int(found[1]) for found in names if found)

    def missing(self, name: str) -> list[SampleIndex]:
        """Prompts, by their numbers, and images that the look does not have yet."""
        there = {*self._files(name)} if name not in self.again else set()
        places = [(number, k) for number in self._numbers() for k in range(self.images)]
        return [place for place in places if _file(place) not in there]

    def draw(self, pipe: DiffusionPipeline, name: str) -> dict[str, list[Image.Image]]:
        """Take a look at the pipeline, put what is missing into the folder, and return these images by their prompts.

        Raises `UnusableImages` if they show nothing; then nothing is added.
        """
        drawn: dict[SampleIndex, Image.Image] = {}
        assert self.encoded is not None, "nothing is missing without prompts"
        for batch, pixels in image_batches(pipe, self.encoded, self.missing(name), self.batch_size, self.seed, name):
            drawn |= {place: to_image(image) for place, image in zip(batch, pixels, strict=True)}
        check_images(drawn.values(), name)
        look = self.folder / name
        with new_directory(look, _LOOK, overwrite=True, part_of=self.folder) as draft:
            for file in self._files(name):
                shutil.copyfile(look / file, draft / file)
            for place, image in drawn.items():
                image.save(draft / _file(place))
        self.again.discard(name)
        self.write_page()
        shown: dict[str, list[Image.Image]] = {}
        for place, image in drawn.items():
            shown.setdefault(self.known[place[0]], []).append(image)
        return shown

    def copy_to(self, folder: Path, part_of: Path) -> None:
        """All looks, and the page, as a part of the output."""
        self.write_page()
        with new_directory(folder, _LOOKS, overwrite=True, part_of=part_of) as draft:
            for name in (BASE, *map(step_name, self.steps()), *map(strength_name, STRENGTHS)):
                for file in self._files(name):
                    (draft / name).mkdir(exist_ok=True)
                    shutil.copyfile(self.folder / name / file, draft / name / file)
            for file in (RECORD, PAGE):
                shutil.copyfile(self.folder / file, draft / file)

    def write_page(self) -> None:
        """All looks so far, prompt by prompt: the base and the steps, then the strengths."""
        steps = self.steps()
        along = [("base", BASE), *((f"step {step:,}", step_name(step)) for step in steps)]
        strip: list[tuple[str, str]] = []
        if steps and all(self._files(strength_name(strength)) for strength in STRENGTHS):
            by_strength = {0.0: BASE, 1.0: step_name(steps[-1])} | {s: strength_name(s) for s in STRENGTHS}
            strip = [(f"{strength:g}", by_strength[strength]) for strength in sorted(by_strength)]
        files = {name: self._files(name) for _, name in (*along, *strip)}
        page = pages.render("timeline.html", title=self.title, prompts=self.known, along=along, strip=strip, files=files)
        with new_file(self.page) as draft:
            draft.write_text(page, encoding="utf-8")

    def _numbers(self) -> list[int]:
        """Of the prompts to look at."""
        return [self.known.index(prompt) for prompt in dict.fromkeys(self.prompts)]

    def _files(self, name: str) -> list[str]:
        """The images of a look, in order; none if there is no such look of ours."""
        return sorted(marks.listed(self.folder / name) or (), key=lambda file: [*map(int, re.findall(r"\d+", file))])


def _file(place: SampleIndex) -> str:
    return f"prompt_{place[0]}_image_{place[1]}.png"
