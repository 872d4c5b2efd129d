"""Looks at the student while it trains: the same noise each time, nothing lost or doubled, the same adapter as without."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from esd_peft import EraseConfig, UserError, erase
from esd_peft.io import marks
from esd_peft.models.stable_diffusion import StableDiffusion
from esd_peft.training import checkpoint, work
from esd_peft.training.checkpoint import Checkpoints
from esd_peft.training.trainer import Trainer

QUICK = {"num_inference_steps": 2, "trajectories": 2, "max_train_steps": 5, "train_batch_size": 4, "rank": 2,
         "learning_rate": 0.1, "closed_form": False, "device": "cpu"}  # fmt: skip
PROMPTS = ["a circle", "<b>a star</b>"]
LOOKS = ["base", "step_000002", "step_000004", "step_000005", "strength_0.5", "strength_1.5"]
IMAGES = [f"prompt_{i}_image_0.png" for i in range(2)]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Images of few steps, a look and a checkpoint after each second step."""
    shorten(monkeypatch)


def shorten(patch):
    patch.setattr(StableDiffusion, "num_inference_steps", 2)
    patch.setattr(work, "LOOKS", 3)  # of five steps
    saved = Checkpoints.save
    patch.setattr(checkpoint, "SECONDS", 0.0)
    patch.setattr(Checkpoints, "save", lambda self, step, *state: saved(self, step, *state) if step != 3 else None)


def run(model, output, **options):
    asked = {"num_validation_images": 1, "validation_prompt": PROMPTS}
    return erase(EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | asked | options)))


def looks(folder):
    """The images of every look, by name."""
    assert all(sorted(path.name for path in look.glob("*.png")) == IMAGES for look in folder.iterdir() if look.is_dir())
    return {look.name: [(look / name).read_bytes() for name in IMAGES] for look in folder.iterdir() if look.is_dir()}


@pytest.fixture(scope="module")
def looked_at(small_sd, tmp_path_factory):
    """The output of a run that logs to TensorBoard; its log lies beside it."""
    folder = tmp_path_factory.mktemp("looked_at")
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.chdir(folder)
        run(small_sd, folder / "out", report_to="tensorboard")
    return folder / "out"


def test_each_look_has_its_folder_and_all_are_on_one_page(looked_at):
    made = looks(looked_at / "validation")
    assert sorted(made) == LOOKS and not looked_at.with_name("out.checkpoint").exists()
    for number in range(2):
        assert len({made[name][number] for name in LOOKS}) == len(LOOKS), "each is of another student"
    assert json.loads((looked_at / "validation" / "prompts.json").read_text())["prompts"] == PROMPTS
    page = (looked_at / "validation" / "report.html").read_text()
    assert [page.count(f'src="{name}/{image}"') for name in LOOKS for image in IMAGES] == [
        2,
        2,
        1,
        1,
        1,
        1,
        2,
        2,
        1,
        1,
        1,
        1,
    ]
    assert "&lt;b&gt;a star&lt;/b&gt;" in page and "<b>a star" not in page


def test_they_reach_the_dashboard_at_their_steps(looked_at):
    log = EventAccumulator(str(looked_at.with_name("runs") / "esd_peft"))
    log.Reload()
    tags = log.Tags()["images"]
    assert len(tags) == len(PROMPTS) and all(tag.startswith("validation/") for tag in tags)
    assert all([image.step for image in log.Images(tag)] == [0, 2, 4, 5] for tag in tags)


def test_looking_changes_nothing_that_is_learned(looked_at, small_sd, tmp_path):
    run(small_sd, tmp_path / "out", num_validation_images=0, validation_prompt=[])
    assert not (tmp_path / "out" / "validation").exists()
    learned, alone = (load_file(path / "adapter_model.safetensors") for path in (looked_at, tmp_path / "out"))
    assert learned.keys() == alone.keys() and all(torch.equal(learned[name], value) for name, value in alone.items())


class Stop(Exception):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture
def stopped(small_sd, tmp_path, monkeypatch):
    """A run that ended after its third step, with a checkpoint of the second: where its images lie."""
    take = Trainer.step

    def counted(self, *batch_and_loss):
        if self.taken == 3:
            raise Stop
        take(self, *batch_and_loss)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "step", counted)
        run(small_sd, tmp_path / "out")
    return tmp_path / "out.checkpoint" / "validation"


def test_a_resumed_run_goes_on_with_its_looks(stopped, looked_at, small_sd, tmp_path, monkeypatch):
    assert sorted(looks(stopped)) == ["base", "step_000002"] and (stopped / "report.html").is_file()
    for name in IMAGES:
        Image.new("RGB", (8, 8)).save(stopped / "base" / name)
    marked = looks(stopped)["base"]
    (stopped / "step_000004").mkdir()  # as of a run that was killed when it had come further
    run(small_sd, tmp_path / "out", resume=True)
    made, whole = looks(tmp_path / "out" / "validation"), looks(looked_at / "validation")
    assert made.pop("base") == marked, "what is there is not drawn again"
    del whole["base"]
    assert made == whole and not (tmp_path / "out.checkpoint").exists()


def test_other_prompts_join_those_before(stopped, small_sd, tmp_path):
    before = looks(stopped)
    run(small_sd, tmp_path / "out", resume=True, validation_prompt=["a moon", PROMPTS[1]])
    folder = tmp_path / "out" / "validation"
    there = {look.name: {path.name for path in look.glob("*.png")} for look in folder.iterdir() if look.is_dir()}
    assert {name: [(folder / name / image).read_bytes() for image in IMAGES] for name in before} == before
    later, all_three = {IMAGES[1], "prompt_2_image_0.png"}, {*IMAGES, "prompt_2_image_0.png"}
    assert there == dict.fromkeys(LOOKS[2:], later) | dict.fromkeys(LOOKS[:2], all_three), "the model is there for these two"
    assert json.loads((folder / "prompts.json").read_text())["prompts"] == [*PROMPTS, "a moon"]
    page = (folder / "report.html").read_text()
    assert all(f'src="{name}/{image}"' in page for name in there for image in there[name])
    assert 'src="step_000004/prompt_0_image_0.png"' not in page, "which nobody has drawn"


def test_looks_outlive_a_resumed_run_that_takes_none(stopped, small_sd, tmp_path):
    before = looks(stopped)
    none = {"num_validation_images": 0, "validation_prompt": []}
    run(small_sd, tmp_path / "out", resume=True, **none)
    folder = tmp_path / "out" / "validation"
    assert looks(folder) == before and not (tmp_path / "out.checkpoint").exists()
    page = (folder / "report.html").read_text()
    assert all(f'src="{name}/{image}"' in page for name in before for image in IMAGES)


def test_a_look_from_after_the_checkpoint_is_taken_again_where_that_is_due(stopped, looked_at, small_sd, tmp_path):
    for name in ("step_000003", "step_000004"):
        shutil.copytree(stopped / "step_000002", stopped / name)
        marks.add(stopped, [f"{name}/"])
    run(small_sd, tmp_path / "out", resume=True)
    made, whole = looks(tmp_path / "out" / "validation"), looks(looked_at / "validation")
    assert made.pop("step_000003") == whole["step_000002"] and made == whole


def test_a_folder_of_somebody_is_no_look(stopped, small_sd, tmp_path):
    (stopped / "step_000004").mkdir()
    (stopped / "step_000004" / "mine.png").write_text("precious")
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"holds .*mine.png, which esd_peft did not write"):
            run(small_sd, tmp_path / "out", **options)
    assert (stopped / "step_000004" / "mine.png").read_text() == "precious"


def test_looks_of_a_run_that_ended_over_its_last_ones_are_in_the_resumed_one(looked_at, small_sd, tmp_path, monkeypatch):
    draw = StableDiffusion.pipeline

    def none_of_the_last(family, *given):
        if (tmp_path / "out").exists():
            raise KeyboardInterrupt
        return draw(family, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StableDiffusion, "pipeline", none_of_the_last)
        run(small_sd, tmp_path / "out")
    run(small_sd, tmp_path / "out", resume=True)
    made = tmp_path / "out" / "validation"
    assert looks(made) == looks(looked_at / "validation")
    assert (made / "report.html").read_bytes() == (looked_at / "validation" / "report.html").read_bytes()
    assert not (tmp_path / "out.checkpoint").exists()


def test_an_output_on_another_disk(looked_at, small_sd, tmp_path, monkeypatch):
    """By a link: its checkpoints lie beside that, and nothing is renamed from there to here."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "real")

    def across(job):
        def checked(one, other, *more):
            if Path(one).resolve().is_relative_to(disk) != Path(other).absolute().is_relative_to(disk):
                raise OSError(errno.EXDEV, "Invalid cross-device link", str(one), None, str(other))
            return job(one, other, *more)

        return checked

    for place, name in ((os, "rename"), (os, "replace"), (Path, "rename"), (Path, "replace")):
        monkeypatch.setattr(place, name, across(getattr(place, name)))
    run(small_sd, tmp_path / "out")
    assert looks(disk / "real" / "validation") == looks(looked_at / "validation")
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


def test_a_look_that_shows_nothing_is_left_out_and_ends_no_training(small_sd, tmp_path, monkeypatch, capsys):
    draw, drawn = StableDiffusion.draw, itertools.count()
    monkeypatch.setattr(
        StableDiffusion, "draw", lambda *a, **said: draw(*a, **said) * (torch.nan if next(drawn) == 2 else 1)
    )
    run(small_sd, tmp_path / "out", rollout_batch_size=4)  # the base, images before, the first look: a batch each
    assert sorted(looks(tmp_path / "out" / "validation")) == [name for name in LOOKS if name != "step_000002"]
    assert "note: images (step_000002) are NaN" in capsys.readouterr().err


def test_a_base_that_shows_nothing_is_said_at_once(small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "draw", lambda *a, **said: torch.zeros(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"images \(base\) are each of one colour only.* leave --validation-prompt out"):
        run(small_sd, tmp_path / "out", rollout_batch_size=1)
    assert not (tmp_path / "out").exists()


def test_what_is_drawn_is_kept_if_the_last_looks_fail(looked_at, small_sd, tmp_path, monkeypatch):
    """The adapter is there by then, and the images of its training are beside it."""
    draw = StableDiffusion.pipeline

    def none_of_the_last(family, *given):
        if (tmp_path / "out").exists():
            raise KeyboardInterrupt
        return draw(family, *given)

    monkeypatch.setattr(StableDiffusion, "pipeline", none_of_the_last)
    with pytest.raises(KeyboardInterrupt, match=r"the adapter in .* is finished"):
        run(small_sd, tmp_path / "out")
    assert sorted(looks(tmp_path / "out" / "validation")) == LOOKS[:3]
    monkeypatch.undo()
    monkeypatch.setattr(StableDiffusion, "num_inference_steps", 2)
    run(small_sd, tmp_path / "out", overwrite=True, max_train_steps=1)
    made = looks(tmp_path / "out" / "validation")
    assert sorted(made) == ["base", "step_000001", *LOOKS[-2:]]
    assert made["base"] == looks(looked_at / "validation")["base"], "which no training changes"
