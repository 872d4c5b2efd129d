"""What an output says it is: this very one, another one of the package, or somebody's."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from esd_peft.errors import UserError
from esd_peft.io import marks
from esd_peft.io.marks import MARK
from esd_peft.io.outputs import (
    check_folder,
    check_new_file,
    check_output,
    empty_folder,
    new_directory,
    new_file,
    take_folder,
)


def written(target, made="an adapter", **options):
    """A directory as an earlier run left it."""
    with new_directory(target, made, overwrite=False, **options) as draft:
        (draft / "a").write_text("1")
    return target


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_output_is_somebody_elses(tmp_path):
    target = written(tmp_path / "out")
    before = contents(tmp_path)
    for job in (
        lambda: check_output(target, "a merged model", overwrite=True),
        lambda: new_directory(target, "a merged model", overwrite=True).__enter__(),
        lambda: check_folder(target, "an evaluation"),
        lambda: take_folder(target, "an evaluation"),
        lambda: empty_folder(target, "the checkpoint of e"),
    ):
        with pytest.raises(UserError, match=r"out holds an adapter, not (a merged|an eval|the check).*; name another"):
            job()
    assert contents(tmp_path) == before
    take_folder(tmp_path / "e.checkpoint", "the checkpoint of e")
    with pytest.raises(UserError, match="holds the checkpoint of e, not the checkpoint of f"):
        take_folder(tmp_path / "e.checkpoint", "the checkpoint of f")


@pytest.mark.parametrize("name", ["merged", "evaluation"])
def test_an_output_that_was_put_into_another_does_not_go_with_it(tmp_path, name):
    target = written(tmp_path / "out")
    written(target / name)
    with pytest.raises(UserError, match=f"holds {name}, which esd_peft did not write as a part of it"):
        check_output(target, "an adapter", overwrite=True)
    assert (target / name / "a").exists()


def test_a_part_goes_with_its_output(tmp_path):
    target = written(tmp_path / "out")
    written(target / "validation", "looks", part_of=target)
    take_folder(target / "evaluation", "an evaluation", part_of=target)
    take_folder(target / "evaluation" / "images" / "before", "images", part_of=target / "evaluation")
    check_output(target, "an adapter", overwrite=True)
    (target / "evaluation" / "images" / "before" / "mine.png").write_text("precious")
    with pytest.raises(UserError, match=r"holds evaluation/images/before/mine.png, which"):
        check_output(target, "an adapter", overwrite=True)


def test_files_that_are_outputs_by_themselves(tmp_path):
    target = written(tmp_path / "out")
    save_file({"a": torch.zeros(1)}, target / "lora.safetensors", {"esd_peft.version": "0.1.0"})
    save_file({"a": torch.zeros(1)}, tmp_path / "own.safetensors", {marks.KEY: "a merged model"})
    (tmp_path / "own.json").write_text(json.dumps(marks.signed({"mean": 1.5}, "the analysis of study a")))
    check_new_file(tmp_path / "own.safetensors", "a merged model", overwrite=True)
    check_new_file(tmp_path / "own.json", "the analysis of study a", overwrite=True)
    for path, made in (
        (target / "lora.safetensors", "a merged model"),
        (tmp_path / "own.safetensors", "the analysis of study a"),
        (tmp_path / "own.json", "the analysis of study b"),
        (target / MARK, "an adapter"),
    ):
        with pytest.raises(UserError, match=r"was not written by this command|has the name that"):
            check_new_file(path, made, overwrite=True)
    with new_file(target / "new.safetensors", standalone=True) as draft:
        draft.write_text("1")
    with pytest.raises(UserError, match=r"holds lora.safetensors, which"):
        check_output(target, "an adapter", overwrite=True)
    os.unlink(target / "lora.safetensors")
    with pytest.raises(UserError, match=r"holds new.safetensors, which"):
        check_output(target, "an adapter", overwrite=True)


@pytest.mark.parametrize(
    "text", ['{"mean": 1.6, %s', "[1]", '"esd_peft.made"', "{", "null", "1e999", "[" * 100000, "\udcff"]
)
def test_json_that_somebody_changed_or_wrote(tmp_path, text):
    mine = json.dumps(marks.signed({"mean": 1.5}, "an analysis"))
    (tmp_path / "a.json").write_text(text.replace("%s", mine[len('{"mean": 1.5, ') :]), errors="surrogateescape")
    assert marks.kind_of(tmp_path / "a.json") is None


def test_a_file_is_not_written_over_another_that_has_its_name(tmp_path):
    take_folder(tmp_path / "out", "an evaluation")
    (tmp_path / "out" / "report.md").write_text("precious")
    with (
        pytest.raises(UserError, match=r"report.md is there and esd_peft did not write it"),
        new_file(tmp_path / "out" / "report.md") as draft,
    ):
        draft.write_text("1")
    assert (tmp_path / "out" / "report.md").read_text() == "precious"


def test_what_was_removed_and_comes_back_is_somebody_elses(tmp_path):
    take_folder(tmp_path / "out", "a thing")
    for name in ("a", "b"):
        with new_file(tmp_path / "out" / name) as draft:
            draft.write_text("1")
    (tmp_path / "out" / "a").unlink()
    marks.drop(tmp_path / "out", ["a"])
    assert marks.recorded(tmp_path / "out") == {"b"} and sorted(os.listdir(tmp_path / "out")) == [MARK, "b"]


def test_a_line_that_a_full_disk_cut_off_takes_no_other_with_it(tmp_path):
    take_folder(tmp_path / "out", "a thing")
    with (tmp_path / "out" / MARK).open("a") as file:
        file.write('"cut o')
    marks.add(tmp_path / "out", ["b"])
    assert marks.recorded(tmp_path / "out") == {"b"}


@pytest.mark.parametrize("text", ["", '"a"\n', '{"made": 3}\n', '{"made', "[" * 100000, '["made"]\n', "\x00\xff"])
def test_marks_that_say_nothing(tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text(text)
    (tmp_path / "out" / "a").write_text("precious")
    assert marks.kind_of(tmp_path / "out") is None
    with pytest.raises(UserError, match="holds a, which esd_peft did not write"):
        check_output(tmp_path / "out", "a thing", overwrite=True)
    with pytest.raises(UserError, match="holds files that esd_peft did not write"):
        take_folder(tmp_path / "out", "a thing")


def test_a_run_that_was_killed_over_its_mark_is_no_obstacle(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("")
    take_folder(tmp_path / "out", "a thing")
    (tmp_path / "out" / MARK).write_text("")
    written(tmp_path / "out")
    assert marks.kind_of(tmp_path / "out") == "an adapter"
