"""The rating page and its key, and what answers say."""

import base64
import csv
import functools
import io
import json
import re
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import commands
from esd_peft.errors import UserError
from esd_peft.evaluation.intervals import percentiles, resample
from esd_peft.io import marks
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig
from esd_peft.study.analyse import _resampled_means, analyse_study, study_table
from esd_peft.study.make import make_study

CONDITIONS = ("real", "base", "erased")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three conditions of four images each, whose files say which condition they are of."""
    root = tmp_path_factory.mktemp("images")
    for k, name in enumerate(CONDITIONS):
        (root / name).mkdir()
        for i in range(4):
            said = PngInfo()
            said.add_text("parameters", f"{name} Van Gogh")
            colour = (60 * k, 50 * i, 120)
            Image.new("RGB", (40 + 20 * k, 40), colour).save(root / name / f"{name}_{i}.png", pnginfo=said)
    return [root / name for name in CONDITIONS]


def make(folders, output, **options):
    return make_study(MakeStudyConfig(**({"condition": folders, "question": "Van Gogh?", "output": output} | options)))


def page_data(path):
    text = (path / "study.html").read_text()
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))


def test_the_page_is_blind_and_the_key_is_not(folders, tmp_path):
    key = make(folders, tmp_path / "study")
    assert json.loads((tmp_path / "study" / "key.json").read_text()) == key
    assert sorted(f"{v['condition']}/{v['file']}" for v in key["items"].values()) == sorted(
        f"{folder.name}/{path.name}" for folder in folders for path in folder.iterdir()
    )
    text = (tmp_path / "study" / "study.html").read_text()
    data = page_data(tmp_path / "study")
    assert [item["id"] for item in data["items"]] == list(key["items"])
    assert not re.search(r"\breal|\bbase\b(?!64)|erased", re.sub(r'"image": "[^"]*"', "", text))
    assert not re.search(r"https?://", text)
    for item in data["items"]:
        assert item["image"].startswith("data:image/webp;base64,")
        assert b"Van Gogh" not in base64.b64decode(item["image"].split(",")[1])
    order = [key["items"][item["id"]]["condition"] for item in data["items"]]
    assert order != sorted(order, key=CONDITIONS.index)


def test_the_same_seed_makes_the_same_study_and_another_one_another(folders, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(folders, tmp_path / name, seed=seed, per_condition=2)
    pages = [(tmp_path / name / "study.html").read_text() for name in "abc"]
    assert pages[0] == pages[1] != pages[2]
    assert len(page_data(tmp_path / "a")["items"]) == 6
    ids = [{item["id"] for item in page_data(tmp_path / name)["items"]} for name in "ac"]
    assert not ids[0] & ids[1]


def test_what_is_said_cannot_break_out_of_the_page(folders, tmp_path):
    hostile = "</script><script>alert(1)</script><!-- <b>STUDY_DATA"
    make(folders, tmp_path / "study", question=hostile, low=hostile)
    text = (tmp_path / "study" / "study.html").read_text()
    assert (
        text.count("<script") == 2
        and text.count("</script>") == 2
        and "<b>" not in text.split('id="data"')[1].split("\n")[0]
    )
    assert page_data(tmp_path / "study")["question"] == hostile


def test_large_images_are_scaled_down_and_references_come_along(folders, tmp_path):
    (tmp_path / "large").mkdir()
    Image.new("RGB", (900, 300)).save(tmp_path / "large" / "a.jpg")
    make([tmp_path / "large"], tmp_path / "study", max_size=120, reference=folders[0])
    data = page_data(tmp_path / "study")
    image = Image.open(io.BytesIO(base64.b64decode(data["items"][0]["image"].split(",")[1])))
    assert image.size == (120, 40)
    assert len(data["reference"]) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"condition": []}, "--condition: name a folder"),
        ({"condition": ["a/x", "b/x"]}, "two folders are named x"),
        ({"condition": ["/nowhere"]}, "--condition /nowhere is no folder with images"),
        ({"reference": "/nowhere"}, "--reference /nowhere"),
        ({"question": " "}, "--question"),
        ({"per_condition": 0}, "--per-condition"),
    ],
)
def test_studies_that_cannot_be_made(folders, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        make(folders, tmp_path / "study", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_image(folders, tmp_path):
    (tmp_path / "erased").mkdir()
    (tmp_path / "erased" / "a.png").write_text("no")
    with pytest.raises(UserError, match=r"--condition .*a\.png cannot be read as an image"):
        make([tmp_path / "erased"], tmp_path / "study")
    assert not (tmp_path / "study").exists()


MEANS = {"real": 4.5, "base": 4.0, "erased": 1.5}


@pytest.fixture
def answered(folders, tmp_path):
    """A study and five raters' answers, drawn around known means."""
    key = make(folders, tmp_path / "study")
    random = np.random.default_rng(0)
    paths = []
    for rater in "ABCDE":
        path = tmp_path / f"{rater}.csv"
        rows = [
            [key["study"], rater, item, int(np.clip(np.floor(MEANS[v["condition"]]) + random.integers(0, 2), 1, 5)), 1, 2.5]
            for item, v in key["items"].items()
        ]
        write(path, rows)
        paths.append(path)
    return tmp_path / "study" / "key.json", paths


def write(path, rows, header=("study", "rater", "item", "rating", "position", "seconds")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))[1:]


def test_means_intervals_and_agreement(answered, tmp_path):
    key, paths = answered
    result = analyse_study(AnalyseStudyConfig(answers=paths, key=key, output=tmp_path / "result.json"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert {name: value for name, value in written.items() if not name.startswith("esd_peft.")} == json.loads(
        json.dumps(result)
    )
    of = json.loads(key.read_text())["items"]
    rows = [row for path in paths for row in read(path)]
    for name in CONDITIONS:
        given = [int(row[3]) for row in rows if of[row[2]]["condition"] == name]
        found = result["conditions"][name]
        assert found["mean"] == pytest.approx(np.mean(given)) and sum(found["ratings"]) == len(given) == 20
        low, high = found["interval"]
        assert low < found["mean"] < high and high - low < 1.2
    assert result["raters"] == 5 and result["ratings"] == 60
    difference = result["differences"]["erased - real"]
    assert difference["interval"][1] < -1
    assert 0.5 < result["krippendorff_alpha"]["ordinal"] < 1
    said = study_table(result)
    assert "Van Gogh?" in said and "5 raters, 60 ratings" in said and all(name in said for name in CONDITIONS)


def test_the_interval_covers_the_truth_as_often_as_it_says(folders, tmp_path):
    """Raters and images have effects of their own; the interval of the mean must hold for new ones of both."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        table = 3 + random.normal(0, 0.5, (12, 1)) + random.normal(0, 0.5, (1, 30)) + random.normal(0, 0.7, (12, 30))
        low, high = percentiles(_resampled_means(table, resample(12, random), random))
        held += low <= 3 <= high
    assert held >= 88


def test_missing_answers_are_left_out(answered, tmp_path):
    key, paths = answered
    rows = read(paths[0])
    write(paths[0], rows[:3])
    result = analyse_study(AnalyseStudyConfig(answers=paths, key=key))
    assert result["ratings"] == 60 - 9


def test_one_rater_is_enough_for_means_but_not_for_agreement(answered):
    key, paths = answered
    result = analyse_study(AnalyseStudyConfig(answers=paths[:1], key=key))
    assert result["krippendorff_alpha"] == {"ordinal": None, "interval": None}
    assert "not defined" in study_table(result)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda rows: [["other", *row[1:]] for row in rows], "line 2: this is an answer to another study"),
        (lambda rows: [[*row[:2], "ffff", *row[3:]] for row in rows], "another study"),
        (lambda rows: [[*row[:3], "6", *row[4:]] for row in rows], "the rating '6' is not one of 1 to 5"),
        (lambda rows: [rows[0], rows[0]], "line 3: A rated"),
        (lambda rows: [], "holds no answer"),
    ],
    ids=["study", "item", "rating", "twice", "empty"],
)
def test_answers_that_do_not_fit(answered, spoil, says):
    key, paths = answered
    write(paths[0], spoil(read(paths[0])))
    with pytest.raises(UserError, match=says):
        analyse_study(AnalyseStudyConfig(answers=paths, key=key))


def test_files_that_do_not_fit(answered, tmp_path):
    key, paths = answered
    with pytest.raises(UserError, match="another file holds answers of A"):
        analyse_study(AnalyseStudyConfig(answers=[paths[0], paths[0]], key=key))
    with pytest.raises(UserError, match="is no key of a study"):
        analyse_study(AnalyseStudyConfig(answers=paths, key=paths[0]))
    with pytest.raises(UserError, match=r"--key .* cannot be read"):
        analyse_study(AnalyseStudyConfig(answers=paths, key=tmp_path / "nothing"))
    with pytest.raises(UserError, match="has no column study"):
        analyse_study(AnalyseStudyConfig(answers=[key], key=key))
    with pytest.raises(UserError, match="--answers: name the CSV files"):
        AnalyseStudyConfig(key=key)


def test_an_analysis_replaces_nothing_but_an_earlier_one(answered, tmp_path):
    key, paths = answered
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    (tmp_path / "key link.json").symlink_to(key)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (key, paths[0], tmp_path / "key link.json", tmp_path / "mine.json"):
        with pytest.raises(UserError, match=r"--output .* (is or holds|was not written by this command)"):
            analyse_study(AnalyseStudyConfig(answers=paths, key=key, output=output))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    result = key.parent / "result.json"
    for _ in range(2):
        analyse_study(AnalyseStudyConfig(answers=paths, key=key, output=result))
    made = json.loads(result.read_text())
    other = marks.signed({"krippendorff_alpha": 0.7}, "the analysis of study of somebody else")
    for values in ({**made, "mine": 1}, other, [*made], "krippendorff_alpha", {"krippendorff_alpha": 0.7}):
        result.write_text(json.dumps(values))
        with pytest.raises(UserError, match="was not written by this command"):
            analyse_study(AnalyseStudyConfig(answers=paths, key=key, output=result))
        assert json.loads(result.read_text()) == values


@pytest.mark.parametrize("changes", [{"question": 3}, {"question": ""}, {"study": None}, {"study": ["s"]}, {"items": []},
    {"items": {"1": "a"}}, {"items": {"1": {"condition": ["a"]}}}, {"items": {}, "conditions": []}, {"conditions": "real"},
    {"conditions": ["real"]}, {"conditions": {"real": 1}}])  # fmt: skip
def test_keys_of_wrong_types(answered, changes):
    key, paths = answered
    key.write_text(json.dumps(json.loads(key.read_text()) | changes))
    with pytest.raises(UserError, match="is no key of a study"):
        analyse_study(AnalyseStudyConfig(answers=paths, key=key))


def test_a_rater_is_no_formula_in_a_spreadsheet():
    """Answers are sent as CSV, whose cells a spreadsheet takes for formulas where they begin with one of these."""
    page = (files("esd_peft.study") / "page.html").read_text()
    pattern = re.search(r'id="rater"[^>]*pattern="([^"]*)"', page).group(1)
    pattern = pattern.replace(r"\p{L}\p{N}", r"\w")  # as Python says letters and digits, but for _
    for name in ("Ann", " Bob-2", "4", "Ä. Ö_ü"):
        assert re.fullmatch(pattern, name), name
    for name in ("=1+1", "+1", "-1", "@a", "-Ann", " =1", "\t=1", "a,b", 'a"b', "a\nb", ""):
        assert not re.fullmatch(pattern, name), name


def test_the_commands(folders, tmp_path):
    run = functools.partial(commands.run, "study.__main__")
    done = run("make", "--question", "Q?", "--output", tmp_path / "study", *(f"--condition={folder}" for folder in folders))
    assert done.returncode == 0 and "12 images of 3 conditions" in done.stdout
    done = run("analyse", "--key", tmp_path / "study" / "key.json", "--answers", tmp_path / "missing.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: --answers") and done.stderr.count("\n") == 1
    assert run("mak").returncode == 2 and "usage" in run("--help").stdout
