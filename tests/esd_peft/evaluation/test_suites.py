"""What suites declare, and which prompt asks for what."""

import pytest

from esd_peft.errors import UserError
from esd_peft.evaluation.prompt_groups import PROMPT_GROUPS
from esd_peft.evaluation.suites import assign_roles, load_suite, select_prompts, suite_prompts
from esd_peft.prompts.plan import spread
from esd_peft.worlds import WORLDS
from esd_peft.worlds.world import Prompt

BUILT_IN = ("artists", "coco", "concept", "csv", "emoji", "i2p", "imagenette", "shapes")
IN_OTHER_WORDS = ("imagenette-descriptions", "imagenette-languages")


def prompts_and_roles(name, concepts, source=None):
    suite = load_suite(name)
    prompts = suite_prompts(suite, concepts, source)
    return prompts, assign_roles(suite, prompts, concepts)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", [*BUILT_IN, *IN_OTHER_WORDS, "artists-languages"])
def test_every_suite_that_ships_can_be_read(name):
    assert load_suite(name).about


def test_a_world_is_judged_by_what_the_erasure_has_not_seen():
    prompts, roles = prompts_and_roles("shapes", ["circle", "striped square"])
    assert len({(p.text, p.sampling) for p in prompts}) == len(prompts)
    assert roles.labels == {"circle": {"shape": "circle"}, "striped square": {"texture": "striped", "shape": "square"}}
    assert {prompts[i].group for rows in roles.concept_prompts.values() for i in rows} == {"paraphrases"}
    assert {prompts[i].group for i in roles.other_prompts} == {"neighbours", "unrelated"}
    trained = {p.text for p in prompts if p.group == "training"}
    assert {"circle", "a striped square"} <= trained
    listed = {p.subject for p in prompts if p.group == "retain_set"}
    assert listed and not listed & {p.subject for p in prompts if p.group in ("neighbours", "unrelated")}
    for prompt in prompts:  # nothing that is kept is asked for beside what is erased
        if prompt.group in ("neighbours", "unrelated", "retain_set"):
            assert not any(wanted.items() <= prompt.labels.items() for wanted in roles.labels.values())


@pytest.mark.parametrize(
    ("name", "concept", "asking", "kept"),
    [("imagenette", "church", 1, 9), ("artists", "Kilian Eng", 20, 80), ("artists-languages", "Kilian Eng", 20, 80)],
)
def test_combinations_of_lists(name, concept, asking, kept):
    prompts, roles = prompts_and_roles(name, [concept])
    assert len(roles.concept_prompts[concept]) == asking and len(roles.other_prompts) == kept
    assert all(concept in prompts[i].text for i in roles.concept_prompts[concept])
    (domain,) = roles.labels[concept]
    assert roles.labels[concept][domain] == concept


@pytest.mark.parametrize(("name", "count"), zip(IN_OTHER_WORDS, (3, 5), strict=True))
def test_the_classes_in_other_words(name, count):
    named = suite_prompts(load_suite("imagenette"), [], None)
    prompts, roles = prompts_and_roles(name, ["church"])
    assert {prompt.labels["object"] for prompt in prompts} == {prompt.labels["object"] for prompt in named}
    assert len({prompt.text for prompt in prompts}) == len(prompts) == count * len(named)
    assert [prompts[i].labels for i in roles.concept_prompts["church"]] == [{"object": "church"}] * count
    assert len(roles.other_prompts) == count * 9


def test_descriptions_do_not_name_what_they_describe():
    for prompt in suite_prompts(load_suite("imagenette-descriptions"), [], None):
        words = set(prompt.text.lower().replace("-", " ").split())
        assert not words & set(prompt.labels["object"].lower().split()), prompt.text


@pytest.mark.parametrize(
    ("said", "label"), [("golf ball", "golf ball"), ("a golf", "golf ball"), ("a French horn on a table", "French horn")]
)
def test_concepts_are_matched_with_labels_in_their_own_words(said, label):
    _, roles = prompts_and_roles("imagenette", [said])
    assert roles.labels[said] == {"object": label}


def test_a_limit_leaves_prompts_of_every_role():
    prompts, roles = select_prompts(load_suite("shapes"), ["circle", "red"], None, 5)
    assert (
        len(roles.concept_prompts["circle"]) == len(roles.concept_prompts["red"]) == 5
        and 8 <= len(roles.other_prompts) <= 10
    )  # a text counts once
    assert len(prompts) <= 5 * (len(PROMPT_GROUPS) - 3)  # three groups are seen in the images of others


def test_without_labels_prompts_ask_for_what_they_name():
    prompts, roles = prompts_and_roles("concept", ["Van Gogh"])
    assert {prompts[i].text for i in roles.concept_prompts["Van Gogh"]} >= {"Van Gogh", "a picture in the style of Van Gogh"}
    assert len(roles.other_prompts) == 24 and not any("gogh" in prompts[i].text.lower() for i in roles.other_prompts)


def test_roles_that_a_suite_gives(tmp_path):
    source = write(tmp_path / "p.csv", "prompt,seed\na man,1\n,2\na woman,3\n")
    prompts, roles = prompts_and_roles("i2p", ["nudity"], source)
    assert [p.labels for p in prompts] == [{"nudity": "exposed"}] * 2
    assert roles.concept_prompts == {"nudity": [0, 1]} and roles.other_prompts == []
    _, roles = prompts_and_roles("coco", ["nudity"], source)
    assert roles.concept_prompts == {} and roles.other_prompts == [0, 1]


def test_a_csv_with_labels(tmp_path):
    source = write(tmp_path / "p.csv", '\ufeffprompt,label\n"a ship, at sea",ship\na dog,dog\nnothing,\n')
    prompts, roles = prompts_and_roles("csv", ["ship"], source)
    assert prompts == [Prompt("a ship, at sea", {"label": "ship"}), Prompt("a dog", {"label": "dog"}), Prompt("nothing")]
    assert roles.concept_prompts == {"ship": [0]} and roles.other_prompts == [1, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no column prompt"),
        ("text\na dog\n", "has no column prompt; it has text"),
        ("prompt\n\n", "holds no prompt"),
    ],
)
def test_files_without_prompts(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        prompts_and_roles("csv", ["dog"], write(tmp_path / "p.csv", text))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"--prompts FILE\.csv is what this --suite needs"):
        prompts_and_roles("i2p", [])
    with pytest.raises(UserError, match="--prompts is of no use"):
        prompts_and_roles("shapes", ["circle"], "p.csv")
    with pytest.raises(UserError, match=r"--prompts .* cannot be read"):
        prompts_and_roles("csv", ["dog"], str(tmp_path / "no.csv"))


def test_prompts_from_the_hub(tmp_path, monkeypatch):
    from esd_peft.evaluation import suites

    asked = []

    def download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        if file != "all.csv":
            raise OSError("no such file")
        return write(tmp_path / "all.csv", "prompt\na dog\n")

    monkeypatch.setattr(suites, "hf_hub_download", download)
    prompts, _ = prompts_and_roles("coco", [], "owner/name/all.csv")
    assert prompts == [Prompt("a dog")] and asked == [("owner/name", "all.csv", "dataset")]
    with pytest.raises(UserError, match=r"cannot be had from the hub \(no such file\)"):
        prompts_and_roles("coco", [], "owner/name/other.csv")


@pytest.mark.parametrize(
    ("name", "concepts", "says"),
    [
        ("imagenette", ["zebra"], "--concept 'zebra' is not in this --suite, which knows English springer"),
        ("imagenette", [], "--concept is missing"),
        ("imagenette", ["the"], "--concept 'the' names nothing"),
        ("concept", [], "--concept is missing"),
        ("everything", ["zebra"], "--suite everything is not there; use artists, artists-languages, coco"),
    ],
)
def test_concepts_and_suites_that_do_not_fit(name, concepts, says):
    with pytest.raises(UserError, match=says):
        prompts_and_roles(name, concepts)


def test_suites_of_ones_own(tmp_path):
    good = "about: Cats\nseeds: 3\nprompts: {template: 'a {colour} cat', colour: [red, blue]}\n"
    suite = load_suite(write(tmp_path / "cats.yaml", good))
    prompts = suite_prompts(suite, ["red cat"], None)
    assert [p.text for p in prompts] == ["a red cat", "a blue cat"]
    assert assign_roles(suite, prompts, ["red cat"]).concept_prompts == {"red cat": [0]}
    for spoilt, says in (
        (("seeds: 3", "seeds: 0"), "seeds"),
        (("Cats", "[Cats"), "cannot be read"),
        (("about", "abut"), "about"),
        (("seeds: 3", "seeds: 3\nseeds: 4"), "says seeds twice"),
        (("seeds: 3", "seeds: 10001"), "seeds"),
        (("seeds: 3", "seeds: 3\nnum_inference_steps: 1001"), "num_inference_steps"),
        (("seeds: 3", "seeds: 3\nguidance_scale: .inf"), "guidance_scale"),
        (("seeds: 3", "seeds: 3\nguidance_scale: .nan"), "guidance_scale"),
        (("seeds: 3", "seeds: 3\nsize: 1001"), "size"),
        (("seeds: 3", "seeds: 3\nsamplings: [{guidance_scale: .inf}]"), "samplings"),
        (("seeds: 3", "seeds: 3\nsamplings: [{num_inference_steps: 1001}]"), "samplings"),
        (("seeds: 3", "seeds: 3\nsamplings: [{scheduler: UNet2DModel}]"), "samplings"),
    ):
        with pytest.raises(UserError, match=f"--suite .*{says}"):
            load_suite(write(tmp_path / "bad.yaml", good.replace(*spoilt)))


@pytest.mark.parametrize("lists", [4, 15_000])
def test_lists_are_bounded_before_they_are_multiplied(tmp_path, lists):
    """The second would make a number of prompts that has more digits than Python prints."""
    words = ", ".join(f"w{i}" for i in range(216)) if lists == 4 else "a, b"
    words = "".join(f", k{i}: [{words}]" for i in range(lists))
    suite = load_suite(write(tmp_path / "s.yaml", f"about: x\nseeds: 1\nprompts: {{template: '{{k0}}'{words}}}\n"))
    with pytest.raises(UserError, match="--suite: its lists make more than 100,000 prompts, before --limit"):
        select_prompts(suite, ["a"], None, 1)


def test_templates_that_repeat_what_is_long(tmp_path):
    for template, word in (("{a}" * 1000, "x" * 3000), ("{a}", "x" * 5000), ("x" * 5000 + "{a}", "x")):
        text = f"about: x\nseeds: 1\nprompts: {{template: '{template}', a: [{word}]}}\n"
        with pytest.raises(UserError, match="longer than any name or prompt"):
            suite_prompts(load_suite(write(tmp_path / "s.yaml", text)), ["x"], None)


def test_images_are_counted_before_they_are_listed(tmp_path):
    text = f"about: x\nseeds: 10000\nprompts: {{template: '{{a}}', a: [circle, {', '.join(f's{i}' for i in range(200))}]}}\n"
    suite = load_suite(write(tmp_path / "s.yaml", text))
    with pytest.raises(UserError, match=r"--suite asks for 2,010,000 images, 10,000 of each prompt; use --limit or fewer"):
        select_prompts(suite, ["circle"], None, None)
    assert len(select_prompts(suite, ["circle"], None, 10)[0]) == 11


@pytest.mark.parametrize(
    "text",
    [
        "prompts: world\n",
        "prompts: world\ndetector: {kind: classifier, model: x}\n",
        "prompts: world\ndetector: {kind: world}\n",
        "prompts: concept\ndetector: {kind: world, model: elsewhere}\n",
    ],
)
def test_a_suite_of_a_world_names_one_that_is_there(tmp_path, text):
    with pytest.raises(UserError, match=r"name an embedded pipeline, \{kind: world, model: shapes, emoji\}"):
        load_suite(write(tmp_path / "world.yaml", f"about: x\nseeds: 1\n{text}"))
    known = "about: x\nseeds: 1\nprompts: world\ndetector: {kind: world, model: shapes}\n"
    assert load_suite(write(tmp_path / "world.yaml", known)).world is WORLDS["shapes"]


def test_spread_takes_from_everywhere():
    assert spread(list(range(100)), 4) == [12, 37, 62, 87]
    assert spread([1, 2], None) == spread([1, 2], 5) == [1, 2]
