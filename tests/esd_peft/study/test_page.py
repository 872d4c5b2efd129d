"""The rating page in a real browser."""

import csv
import time

import pytest
from PIL import Image

from browser import PHONE, chromium, fits, messages, resize
from esd_peft.options.study import AnalyseStudyConfig, MakeStudyConfig
from esd_peft.study.analyse import analyse_study
from esd_peft.study.make import make_study

HOSTILE = "How much <script>document.title='broken'</script> & \"art\"?"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    for k, name in enumerate(("base", "erased")):
        (root / name).mkdir()
        for i in range(3):
            Image.new("RGB", (60, 40), (200 * k, 80 * i, 90)).save(root / name / f"{i}.png")
    folders = [root / "base", root / "erased"]
    key = make_study(
        MakeStudyConfig(condition=folders, question=HOSTILE, reference=root / "base", output=root / "study", low="no way")
    )
    return root / "study", key


@pytest.fixture
def driver(tmp_path):
    with chromium(tmp_path) as started:
        yield started


def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.02)
    return value


def find(driver, id):
    return driver.find_element("id", id)


def place(driver):
    return find(driver, "place").text


def start(driver, study, name="Ann B."):
    driver.get((study[0] / "study.html").as_uri())
    find(driver, "rater").clear()
    find(driver, "rater").send_keys(name + "\n")
    wait(lambda: not find(driver, "start").is_displayed())


def press(driver, key, then):
    driver.find_element("tag name", "body").send_keys(key)
    wait(lambda: place(driver) == f"Image {then} of 6" or find(driver, "done").is_displayed())


def order(driver):
    return driver.execute_script("return order.map((item) => item.id)")


def test_a_rater_goes_through_and_the_answers_are_analysed(driver, study, tmp_path):
    start(driver, study)
    assert driver.title == "Rate images"  # the question's script did not run
    assert HOSTILE in driver.find_element("css selector", "#rate .question").text
    seen = order(driver)
    assert sorted(seen) == sorted(study[1]["items"])
    given = {}
    for i, rating in enumerate((5, 1, 2, 3, 4)):
        assert place(driver) == f"Image {i + 1} of 6"
        assert driver.execute_script("return document.getElementById('image').naturalWidth") == 60
        given[seen[i]] = rating
        press(driver, str(rating), i + 2)
    press(driver, "\ue012", 5)  # left: the last answer is shown, and may be changed
    pressed = driver.find_elements("css selector", ".scale button[aria-pressed=true]")
    assert [button.text for button in pressed] == ["4"]
    press(driver, "2", 6)
    given[seen[4]] = 2
    driver.find_elements("css selector", ".scale button")[2].click()
    given[seen[5]] = 3
    wait(lambda: find(driver, "done").is_displayed())
    assert "Thank you" in find(driver, "thanks").text
    find(driver, "save").click()
    path = wait(lambda: list((tmp_path / "downloads").glob("answers-*-Ann B..csv")))[0]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["item"]: int(row["rating"]) for row in rows} == given
    assert [row["position"] for row in rows] == list("123456") and all(float(row["seconds"]) >= 0 for row in rows)
    result = analyse_study(AnalyseStudyConfig(answers=[path], key=study[0] / "key.json"))
    assert result["ratings"] == 6
    assert not messages(driver)


def test_answers_survive_a_reload_and_raters_do_not_mix(driver, study):
    start(driver, study, "first")
    ids = order(driver)
    press(driver, "3", 2)
    press(driver, "4", 3)
    start(driver, study, "first")
    assert place(driver) == "Image 3 of 6" and order(driver) == ids
    start(driver, study, "second")
    assert place(driver) == "Image 1 of 6"
    orders = {tuple(ids)}
    for name in ("second", "third", "fourth"):
        start(driver, study, name)
        orders.add(tuple(order(driver)))
    assert len(orders) > 1


def test_what_is_not_a_rating_does_nothing(driver, study):
    start(driver, study, "curious")
    for key in ("6", "0", "x", "\ue014", "\ue012"):  # right, left
        driver.find_element("tag name", "body").send_keys(key)
    assert place(driver) == "Image 1 of 6"
    find(driver, "stop").click()
    assert "6 of 6 images are not rated yet" in find(driver, "thanks").text
    find(driver, "again").click()
    assert place(driver) == "Image 1 of 6"
    driver.get((study[0] / "study.html").as_uri())
    find(driver, "rater").clear()
    find(driver, "rater").send_keys('a,"b"\n')  # would spoil the CSV
    assert find(driver, "start").is_displayed()


def test_it_fits_a_phone(driver, study):
    resize(driver, PHONE)
    start(driver, study, "phone")
    assert fits(driver)
    bottom = driver.execute_script("return document.querySelector('.scale').getBoundingClientRect().bottom")
    assert bottom <= PHONE[1]
    for button in driver.find_elements("css selector", ".scale button"):
        assert button.size["height"] >= 44 and button.size["width"] >= 44
