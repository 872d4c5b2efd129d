"""Files that anybody may have written: no pipe is waited for, sizes are bounded, a byte order mark is no text."""

import json
import os
import signal
import time

import pytest
import yaml

from esd_peft import EraseConfig, UserError
from esd_peft.attacks.prompts import Prompts
from esd_peft.evaluation.suites import load_suite, suite_prompts
from esd_peft.io import text as text_files
from esd_peft.io.text import UnreadableError, read_bytes, read_csv, read_json, read_lines, read_text, read_yaml, shown
from esd_peft.options.command_line import parse
from esd_peft.options.study import AnalyseStudyConfig
from esd_peft.study.analyse import analyse_study

KEY = {"study": "s", "question": "Q?", "conditions": ["a"], "items": {"1": {"condition": "a"}}}


def answers(path):
    key = path.with_name("key.json")
    key.write_text(json.dumps(KEY))
    return analyse_study(AnalyseStudyConfig(key=key, answers=[path]))


def key(path):
    given = path.with_name("answers.csv")
    given.write_text("study,rater,item,rating\ns,R,1,3\n")
    return analyse_study(AnalyseStudyConfig(key=path, answers=[given]))


# every option that names a text file: what reads it, and a good one
OPTIONS = {
    "--config": (lambda path: parse(EraseConfig, "erase", ["--config", str(path)]), "concept: circle\n"),
    "--attack-prompts": (lambda path: Prompts(path).templates, "# mine\na {}\n"),
    "--prompts": (lambda path: suite_prompts(load_suite("csv"), ["circle"], str(path)), "prompt\na circle\na star\n"),
    "--suite": (lambda path: load_suite(str(path)), "about: mine\nprompts: concept\nseeds: 1\n"),
    "--answers": (answers, "study,rater,item,rating\ns,R,1,3\n"),
    "--key": (key, json.dumps(KEY)),
}
every_option = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture(autouse=True)
def patience():
    """A reader that waits is an error, not a test that never ends."""

    def waited(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@every_option
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nothing", "endless link"])
def test_only_regular_files_are_read(option, kind, tmp_path):
    path = tmp_path / "file.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(UserError, match=option) as error:
        OPTIONS[option][0](path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@every_option
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\xc3\x28", b"a: \xed\xa0\x80", "a".encode("utf-16")])
def test_what_is_not_utf_8(option, content, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=option):
        OPTIONS[option][0](path)


@every_option
def test_a_byte_order_mark_is_no_text(option, tmp_path):
    read, text = OPTIONS[option]
    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding=encoding)
        found.append(read(path))
    assert found[0] == found[1]


def test_large_yaml_is_not_parsed(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({"preserve": ["a red square"] * 200_000}))
    start = time.process_time()
    for option in ("--config", "--suite"):
        with pytest.raises(UserError, match=f"{option}.*larger than 256 KiB"):
            OPTIONS[option][0](path)
    assert time.process_time() - start < 1
    path.write_text("[" * 2**18)  # the largest that is parsed
    with pytest.raises(UnreadableError):
        read_yaml(path)


def test_sizes_are_bounded_before_they_are_read(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2**40)
    for read in (read_text, read_json, read_yaml, read_lines, read_csv):
        with pytest.raises(UnreadableError, match="is larger than"):
            read(path)
    path.write_bytes(b"abc")
    assert read_bytes(path, 3) == b"abc"
    with pytest.raises(UnreadableError):
        read_bytes(path, 2)


def test_csv_cells_are_all_there(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text('prompt,label\r\n"a, ""b""\nc",x\r\nshort\r\nlong,y,z,w\r\n\r\n')
    assert read_csv(path) == (
        ["prompt", "label"],
        [{"prompt": 'a, "b"\nc', "label": "x"}, {"prompt": "short", "label": ""}, {"prompt": "long", "label": "y"}],
    )
    path.write_text("a" * 200_000)
    with pytest.raises(UnreadableError, match="it is not CSV"):
        read_csv(path)
    path.write_text("")
    assert read_csv(path) == ([], [])


@pytest.mark.parametrize(
    ("read", "text", "key"),
    [
        (read_yaml, "concept: circle\nmodel: m\nconcept: square\n", "concept"),
        (read_yaml, "a: {b: [{c: 1, d: 2, c: 3}]}", "c"),
        (read_yaml, "1: a\n0x1: b", "1"),
        (read_json, '{"a": [{"b": 1, "b": 1}]}', "b"),
        (read_csv, "prompt,label,prompt\na,b,c\n", "prompt"),
    ],
)
def test_what_stands_there_twice_is_not_read(read, text, key, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=f"it says {key} twice; say it once"):
        read(path)


@pytest.mark.parametrize("text", ["<<: {a: 1}\na: 2", "a: 1\n<<: {b: 2}"])
def test_yaml_is_not_merged(text, tmp_path):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UnreadableError, match="<< is not read"):
        read_yaml(path)


@pytest.mark.parametrize("option", ["--config", "--suite"])
def test_options_that_are_given_twice_in_a_file(option, tmp_path):
    path = tmp_path / "file.yaml"
    read, text = OPTIONS[option]
    first = text.splitlines()[0]
    path.write_text(f"{text}{first}\n")
    with pytest.raises(UserError, match=f"{option}.* twice; say it once"):
        read(path)


@pytest.mark.parametrize("text", ['"a circle,x\na star,y\n', 'a star,y\n"a circle,x\n', '"a circle,x\n"a star",y\n'])
def test_a_quote_that_is_not_closed_takes_no_rows(text, tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("prompt,label\n" + text)
    with pytest.raises(UnreadableError, match=r"it is not CSV after line .*: close its quotes"):
        read_csv(path)
    with pytest.raises(UserError, match=r"--prompts .* close its quotes"):
        OPTIONS["--prompts"][0](path)


def test_rows_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "_MOST_ROWS", 2)
    path = tmp_path / "file.csv"
    path.write_text("a\n1\n2\n")
    assert len(read_csv(path)[1]) == 2
    path.write_text("a\n1\n2\n3\n")
    with pytest.raises(UnreadableError, match="it has more than 2 rows"):
        read_csv(path)


def test_what_cannot_be_seen_is_shown():
    assert shown("ä ½\u00a0 \U0001f600") == "ä ½\u00a0 \U0001f600"
    assert shown("a\x1b[2J\x00\n\u202e\udcff") == r"a\x1b[2J\x00\n\u202e\udcff"


@pytest.mark.parametrize("text", ["a\0b", "a\udcff", "\ud800"])
def test_options_that_could_not_be_written(text):
    for options in ({"output": text}, {"preserve": ["a star", text]}, {"model": text}):
        flag = "--" + next(iter(options)).replace("_", "-")
        with pytest.raises(UserError, match=f"{flag}.* is no character of a name or prompt; leave it out"):
            EraseConfig(concept="circle", **options)
    with pytest.raises(UserError, match="--concept"):
        EraseConfig(concept=text)
    EraseConfig(concept="circle", output="ä", preserve="a \U0001f600")
