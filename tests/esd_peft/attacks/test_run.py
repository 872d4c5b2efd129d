"""evaluate --attack from end to end, on a small random pipeline with a small random detector."""

import csv
import json

import pytest
import torch
from PIL import Image

from detectors import small_classifier
from esd_peft import EraseConfig, EvaluateConfig, UserError, erase, evaluate
from esd_peft.evaluation.result import AttackResult
from esd_peft.models.stable_diffusion import StableDiffusion
from runs import SHORTEST

QUICK = SHORTEST | {"max_train_steps": 2}
ALL = ["textual-inversion", "prefix", "prompts", "fine-tuning"]


@pytest.fixture(scope="module")
def options(small_sd, tmp_path_factory):
    root = tmp_path_factory.mktemp("attacked")
    erase(EraseConfig(concept="circle", model=str(small_sd), output=root / "erased", learning_rate=0.3, **QUICK))
    with (root / "p.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("prompt", "label"), ("a red circle", "circle"), ("a circle", "circle"), ("a star", "star")]
        )
    detector = small_classifier(root / "resnet", ["circle, disc", "star"])
    return {
        "erased": root / "erased", "suite": "csv", "prompts": str(root / "p.csv"), "detector": str(detector), "seeds": 2,
        "num_inference_steps": 2, "attack_steps": 2, "attack_images": 3, "attack_examples": 3, "device": "cpu",
    }  # fmt: skip


def test_every_attack_is_judged_and_shown(options, tmp_path):
    result = evaluate(EvaluateConfig(**options, attack=ALL, output=tmp_path / "out"))
    names = ["textual inversion", "prefix", "prompts", "fine-tuning"]
    assert [attack.name for attack in result.attacks] == names
    for attack in result.attacks:
        assert isinstance(attack, AttackResult) and attack.concept == "circle"
        assert all(change.before == attack.curve[0][1].before for _, change in attack.curve)
        if attack.name != "prompts":
            assert [budget for budget, _ in attack.curve] == [0, 1, 2]
            assert attack.nfe == 2 * 8 * 3 and attack.curve[0][1].after.count == 3
    # nothing spent yet: the images of the suite, base and erased
    first = [attack.curve[0][1] for attack in result.attacks if attack.name != "prompts"]
    assert first[0] == first[1] == first[2]
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [a["curve"][-1]["budget"] for a in found["attacks"]] == [2, 2, len(result_prompts()), 2]
    for file in ("report.html", "report.md"):
        text = (tmp_path / "out" / file).read_text()
        assert all(f"{name}: circle" in text for name in names) and "(NFE)" in text
    assert "Can it be brought back?" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(("wrong", "says"), [(torch.nan, "NaN"), (0.0, "each of one colour")])
def test_attacked_images_that_show_nothing_bring_nothing_back(options, tmp_path, monkeypatch, wrong, says):
    evaluate(EvaluateConfig(**options, output=tmp_path / "out"))  # whose images are used again
    draw = StableDiffusion.draw
    monkeypatch.setattr(StableDiffusion, "draw", lambda *a, **said: draw(*a, **said) * wrong)
    with pytest.raises(UserError, match=rf"images \(attacked\) are {says}"):
        evaluate(EvaluateConfig(**options, attack=["prompts"], output=tmp_path / "out"))


def result_prompts():
    from esd_peft.attacks.prompts import Prompts

    return Prompts().templates


def test_the_same_seed_gives_the_same_figures_and_images_may_come_from_a_folder(options, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 30), (120 * i, 50, 0)).save(tmp_path / "images" / f"{i}.png")
    folder = {"attack": ["textual-inversion"], "attack_reference": tmp_path / "images"}
    one, other = (evaluate(EvaluateConfig(**options, **folder, output=tmp_path / "out")) for _ in range(2))
    assert one.attacks == other.attacks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suite": "concept", "detector": None, "prompts": None}, "--attack needs a --suite"),
        ({"attack_prompts": "/nowhere"}, "--attack-prompts is for --attack prompts"),
        ({"attack": ["prompts"], "attack_prompts": "/nowhere"}, "--attack-prompts /nowhere cannot be read"),
        ({"attack_reference": "/nowhere"}, "--attack-reference /nowhere is no folder"),
        ({"quantize": "nf4"}, "--attack does not work with --quantize"),
        ({"attack": ["magic"]}, "--attack"),
    ],
    ids=str,
)
def test_input_that_cannot_work(options, tmp_path, changes, says):
    values = options | {"attack": ["prefix"], "output": tmp_path / "out"} | changes
    with pytest.raises(UserError, match=says) as error:
        evaluate(EvaluateConfig(**values))
    assert "\n" not in str(error.value)
