"""The images of `--validation-prompt`: a folder for each look at the student, and a page of them all.

    validation/report.html
    validation/prompts.json                           which prompts, how many images of each, from which seed
    validation/base/prompt_0_image_0.png              the model before
    validation/step_000100/prompt_0_image_0.png       the student after so many steps, the last of which made the adapter
    validation/strength_0.5/prompt_0_image_0.png      the finished adapter, counted half

Image k of a prompt starts from the same noise in all of them. While it trains the folder lies in `OUTPUT.checkpoint`, since
the output appears only when it is whole.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from esd_peft.evaluation import pages
from esd_peft.io.outputs import empty_folder, new_directory, new_file, take_folder
from esd_peft.io.paths import is_dir
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.sampling import EncodedPrompts, SampleIndex, check_images, image_batches, to_image

FOLDER, PAGE, RECORD = "validation", "report.html", "prompts.json"
BASE = "base"
STRENGTHS = (0.5, 1.5)  # of the finished adapter, beside 0, which is the base, and 1


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
    prompts: list[str]
    images: int  # of each prompt
    seed: int
    batch_size: int
    encoded: EncodedPrompts
    title: str  # of the page

    @property
    def page(self) -> Path:
        """Shows all looks so far."""
        return self.folder / PAGE

    def open(self, last_step: int | None) -> None:
        """Start; or go on from `last_step`, with the looks up to there, if they are of these prompts, images and noise."""
        made_with = {"prompts": self.prompts, "images": self.images, "seed": self.seed}
        record = self.folder / RECORD
        try:
            same = last_step is not None and read_json(record) == made_with
        except UnreadableError:
            same = False
        if is_dir(self.folder) and not same:
            empty_folder(self.folder)
        take_folder(self.folder)
        with new_file(record) as draft:
            draft.write_text(json.dumps(made_with, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        for step in self.steps():
            if last_step is None or step > last_step:  # the run that was killed had come further than its checkpoint
                shutil.rmtree(self.folder / step_name(step))

    def steps(self) -> list[int]:
        """Those that were looked at, in order."""
        names = [re.fullmatch(r"step_(\d{6,})", path.name) for path in self.folder.iterdir()]
        return sorted(int(found[1]) for found in names if found)

    def has(self, name: str) -> bool:
        """Whether that look was taken."""
        return is_dir(self.folder / name)

    def draw(self, pipe: DiffusionPipeline, name: str) -> dict[str, list[Image.Image]]:
        """Take a look at the pipeline, put it into the folder, and return its images by their prompts.

        Raises `UnusableImages` if they show nothing; then there is no such look.
        """
        places = [(i, k) for i in range(len(self.prompts)) for k in range(self.images)]
        drawn: dict[SampleIndex, Image.Image] = {}
        for batch, pixels in image_batches(pipe, self.encoded, places, self.batch_size, self.seed, name):
            drawn |= {place: to_image(image) for place, image in zip(batch, pixels, strict=True)}
        check_images(drawn.values(), name)
        with new_directory(self.folder / name, overwrite=True) as draft:
            for place, image in drawn.items():
                image.save(draft / f"prompt_{place[0]}_image_{place[1]}.png")
        self.write_page()
        return {prompt: [drawn[i, k] for k in range(self.images)] for i, prompt in enumerate(self.prompts)}

    def move(self, folder: Path) -> None:
        """From now on it is there."""
        self.folder = self.folder.rename(folder)

    def write_page(self) -> None:
        """All looks so far, prompt by prompt: the base and the steps, then the strengths."""
        steps = self.steps()
        along = [("base", BASE), *((f"step {step:,}", step_name(step)) for step in steps)]
        strip: list[tuple[str, str]] = []
        if all(self.has(strength_name(strength)) for strength in STRENGTHS):
            by_strength = {0.0: BASE, 1.0: step_name(steps[-1])} | {s: strength_name(s) for s in STRENGTHS}
            strip = [(f"{strength:g}", by_strength[strength]) for strength in sorted(by_strength)]
        page = pages.render(
            "timeline.html", title=self.title, prompts=self.prompts, images=self.images, along=along, strip=strip
        )
        with new_file(self.page) as draft:
            draft.write_text(page, encoding="utf-8")
