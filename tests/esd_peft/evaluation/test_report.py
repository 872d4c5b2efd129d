"""The report: what it says, that no text breaks out of it, and how it looks in a browser."""

import base64
import dataclasses
import json
import re

import pytest

from browser import DESKTOP, PHONE, chromium, fits, messages, resize
from esd_peft.evaluation.detectors import Judge
from esd_peft.evaluation.rates import Accuracies, Change, Rate
from esd_peft.evaluation.report import render
from esd_peft.evaluation.result import AttackResult, Evaluation, Measure, Score
from esd_peft.evaluation.tables import tables
from esd_peft.evaluation.text import as_markdown, as_text

HOSTILE = "<script>document.title='broken'</script>|<img src=x onerror=\"document.title='broken'\">"
UNSEEN = "red\x1b[2J\x00\u202e\ud800\r\nstar ![](http://x) `=1+1`"
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="


def change(before, after, count=50):
    return Change(Rate(before, count), Rate(after, count))


def evaluation(target=None, others=None, **options):
    others = others or {"shape": {"star": change(50, 50), "cross": change(49, 49)}, "colour": {"red": change(50, 50)}}
    found = Accuracies({"circle": target or change(100, 2, 100)}, others, change(40, 39), frozenset({"shape"}))
    scores = {"before": Score(30, (29, 31), 50), "after": Score(20, (19, 21), 50)}
    defaults = {
        "suite": "shapes", "about": "Shapes", "concepts": ["circle"], "prompts": 10, "seeds": 5, "num_inference_steps": 25,
        "guidance_scale": 3.0, "detector": Judge("judge", "1.0", "the most likely"), "accuracies": found,
        "counts": {"before": {}, "after": {}}, "notes": [], "seconds": {"before": 1.0},
        "measures": [Measure(Judge("CLIP score", "clip 1", "cosine"), {"concept prompts": scores})],
        "command": "python -m esd_peft.evaluate --erased erased", "config": {"seed": 0}, "version": "1",
    }  # fmt: skip
    return Evaluation(**defaults | options)


def levels(result):
    return [verdict.level for verdict in result.verdicts]


@pytest.mark.parametrize(
    ("target", "level", "says"),
    [
        (change(50, 0), "good", "circle is gone: recognised in 0 of the 50 images"),
        (change(16, 0, 16), "partial", "seems gone, but the images are too few"),
        (change(100, 4, 100), "good", "circle is gone"),
        (change(50, 10), "partial", "partly gone"),
        (change(50, 40), "bad", "still there"),
        (change(796, 30, 4703), "good", "circle is gone"),
        (change(796, 134, 4703), "partial", "partly gone"),
        (change(2, 0), "unknown", "hardly knew it before"),
    ],
)
def test_whether_it_is_gone(target, level, says):
    verdict = evaluation(target).verdicts[0]
    assert verdict.level == level and says in verdict.text
    assert "95 % interval" in verdict.text


@pytest.mark.parametrize(
    ("star", "cross", "level", "says"),
    [
        (change(50, 50), change(50, 50), "good", "none of it loses anything"),
        (change(50, 49), change(50, 50), "good", "star loses most, 2.0 points"),
        (change(50, 46), change(50, 50), "partial", "mostly intact"),
        (change(50, 30), change(50, 50), "bad", "suffers"),
    ],
)
def test_whether_the_rest_is_intact(star, cross, level, says):
    others = {"shape": {"star": star, "cross": cross, "heart": change(50, 50), "square": change(50, 50)}}
    verdict = evaluation(others=others).verdicts[1]
    assert verdict.level == level and says in verdict.text


def test_attacks_are_part_of_the_verdict_and_their_lack_is_said():
    assert "not attacked" in evaluation().verdicts[-1].text
    attack = AttackResult("textual inversion", "circle", "steps", [(10, change(50, 1)), (100, change(50, 30))])
    attacked = evaluation(attacks=[attack])
    assert levels(attacked)[-1] == "bad" and "brings circle back in 60.0" in attacked.verdicts[-1].text
    assert "(at 100 steps)" in attacked.verdicts[-1].text
    assert any(table.title == "textual inversion: circle" and len(table.rows) == 2 for table in tables(attacked))
    assert json.loads(json.dumps(attacked.to_dict()))["attacks"][0]["curve"][1]["after"]["hits"] == 30
    assert render(attacked, {}).count("<polyline") == 2


def test_without_a_detector_nothing_is_claimed():
    result = evaluation(accuracies=None, detector=None)
    assert levels(result) == ["unknown", "unknown"]
    assert "<svg" not in render(result, {}) and result.to_dict()["targets"] == {}


def test_the_same_figures_in_every_form():
    result = evaluation(counts={"before": {"FACE": 3}, "after": {"FACE": 2, "FEET": 1}})
    figures = result.to_dict()
    assert figures["unlearning_accuracy"] == pytest.approx(0.98)
    assert figures["targets"]["circle"]["after"] == {
        "hits": 2, "count": 100, "share": 0.02, "interval": pytest.approx((0.0055, 0.0700), abs=1e-4)
    }  # fmt: skip
    assert figures["same_domain"]["after"]["hits"] == 99 and figures["cross_domain"]["after"]["hits"] == 50
    page, markdown, text = render(result, {}), as_markdown(result), as_text(result)
    for form in (page, markdown, text):
        assert "circle is gone" in form and "20 (19–21)" in form and "2.0\u00a0%" in form
    assert "| FEET | 0 | 1 |" in markdown and "| circle | 100.0\u00a0% | 2.0\u00a0% | −98.0 | 0.6–7.0 | 100 |" in markdown
    assert result.command in page and result.command in markdown


def hostile(text=HOSTILE):
    others = {text: {text: change(50, 49)}}
    attack = AttackResult(text, text, text, [(1, change(50, 1)), (5, change(50, 9))])
    result = dataclasses.replace(evaluation(others=others), concepts=[text], notes=[text], attacks=[attack],
                                 command=text, config={"seed": text}, about=text)  # fmt: skip
    figure = {"prompt": text, "before": [PIXEL, PIXEL], "after": [PIXEL, PIXEL]}
    return result, render(result, {f"Asked for: {text}": [figure]})


def test_what_cannot_be_seen_is_shown():
    result, page = hostile(UNSEEN)
    for form in (page, as_markdown(result)):
        assert all(char.isprintable() or char in "\n\xa0" for char in form)
        assert r"red\x1b[2J\x00\u202e\ud800" in form.replace(r"\\", "\\").replace(r"\[", "[")
        form.encode()
    assert not re.search(r"(?<!\\)!?\[", re.sub(r"(?m)^    .*", "", as_markdown(result)))  # no image is fetched


def test_no_text_breaks_out_of_the_report():
    result, page = hostile()
    assert "<script" not in page and "<img src=x" not in page
    assert not re.search(r'(src|href)="(?!data:image/)', page) and not re.search(r"url\(|https?://|@import", page)
    markdown = as_markdown(result).replace(f"    {HOSTILE}", "")  # an indented block is code
    assert "<script" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (3, 4, 5, 7) for row in rows)


def test_the_report_in_a_browser(tmp_path):
    _, page = hostile()
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    with chromium(tmp_path / "chromium") as driver:
        for size in (PHONE, DESKTOP):
            resize(driver, size)
            driver.get(path.as_uri())
            assert fits(driver)
        assert driver.title == f"What is left of {HOSTILE}"
        assert HOSTILE in driver.find_element("css selector", "figcaption").text
        assert driver.execute_script("return document.images.length") == 4
        assert driver.execute_script("return [...document.images].every((image) => image.naturalWidth === 1)")
        tops = [driver.find_element("css selector", name).location["y"] for name in (".verdict", "svg", "figure", "table")]
        assert tops == sorted(tops)
        assert not messages(driver)
        printed = driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
        assert base64.b64decode(printed).startswith(b"%PDF")
