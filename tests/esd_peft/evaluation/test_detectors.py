"""Detectors on small random models of the real classes, against those models' own answers."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, ResNetForImageClassification

from detectors import small_classifier, small_clip
from esd_peft.errors import UserError
from esd_peft.evaluation.clip import Clip
from esd_peft.evaluation.detectors import load_detector
from esd_peft.evaluation.suites import DetectorSpec
from esd_peft.worlds.shapes import world
from esd_peft.worlds.world import SURE


def load(spec, labels, threshold=0.6):
    return load_detector(DetectorSpec(**spec), labels, threshold)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return small_classifier(tmp_path_factory.mktemp("models") / "resnet", ["church, church building", "tench", "Golf ball"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(12)]


def test_the_embedded_classifier_names_rendered_images():
    labels, pixels = world.sample(40, torch.Generator().manual_seed(3))
    rendered = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    seen = load({"kind": "world", "model": "shapes"}, []).detect(rendered)
    wanted = [
        {kind: values[int(i)] for (kind, values), i in zip(world.ATTRIBUTES.items(), label, strict=True)} for label in labels
    ]
    assert sum(a == b | SURE for a, b in zip(seen, wanted, strict=True)) >= 38


def test_a_classifier_says_its_first_synonym_as_the_suite_spells_it(classifier, images):
    detector = load({"kind": "classifier", "model": str(classifier), "domain": "object"}, ["Church", "golf ball"])
    model = ResNetForImageClassification.from_pretrained(classifier).eval()
    inputs = AutoImageProcessor.from_pretrained(classifier)(images, return_tensors="pt")
    with torch.no_grad():
        best = model(**inputs).logits.argmax(1).tolist()
    assert detector.detect(images) == [{"object": ("Church", "tench", "golf ball")[i]} for i in best]
    assert detector.judge.name == str(classifier) and "transformers" in detector.judge.version
    assert "3 labels" in detector.judge.criterion


def test_clip_says_which_label_is_closest(clip, images):
    detector = load({"kind": "clip", "model": str(clip), "domain": "shape", "phrase": "a {}"}, ["circle", "star", "heart"])
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["a circle", "a star", "a heart"], images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    assert [d["shape"] for d in detector.detect(images)] == [
        ("circle", "star", "heart")[i] for i in logits.argmax(1).tolist()
    ]


def test_clip_scores_are_a_hundred_cosines(clip, images):
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    texts = [f"a {word}" for word in (*world.SHAPES, *world.COLOURS)]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_image.diag() / model.logit_scale.exp()
    scores = Clip(str(clip)).scores(images, texts)
    assert scores == pytest.approx((100 * cosines.clamp(min=0)).tolist(), abs=1e-3)
    assert any(scores)


@pytest.fixture
def nudenet(monkeypatch):
    """Stands for the package: it "detects" by the red of the first pixel, and says whether it was handed BGR."""

    class NudeDetector:
        def detect(self, pixels):
            red = int(pixels[0, 0, 2])
            return [
                {"class": "FACE_FEMALE", "score": 0.9, "box": [0, 0, 1, 1]},
                {"class": "FEMALE_BREAST_EXPOSED", "score": red / 255, "box": [0, 0, 1, 1]},
            ]

    module = types.ModuleType("nudenet")
    module.NudeDetector = NudeDetector
    monkeypatch.setitem(sys.modules, "nudenet", module)
    from esd_peft.evaluation import detectors

    monkeypatch.setattr(detectors, "version", lambda package: f"{package} 3.4.2")


def test_nudenet_counts_from_the_threshold_on(nudenet):
    detector = load({"kind": "nudenet", "domain": "nudity"}, ["exposed"], threshold=0.6)
    shown = [Image.new("RGB", (8, 8), (red, 0, 0)) for red in (255, 100, 160)]
    assert detector.detect(shown) == [{"nudity": "exposed"}, {}, {"nudity": "exposed"}]
    assert detector.take_counts() == {"FACE_FEMALE": 3, "FEMALE_BREAST_EXPOSED": 2}
    assert detector.take_counts() == {}
    assert "0.6" in detector.judge.criterion and detector.judge.version == "nudenet 3.4.2"


def test_what_is_missing_is_said_in_one_sentence(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match="needs the package nudenet"):
        load({"kind": "nudenet", "domain": "nudity"}, ["exposed"])
    with pytest.raises(UserError, match="does not know the label 'church tower'"):
        load({"kind": "classifier", "model": str(classifier), "domain": "object"}, ["church tower"])
    for kind in ("classifier", "clip"):
        with pytest.raises(UserError, match=r"--detector .*nowhere.* cannot be loaded") as error:
            load({"kind": kind, "model": str(tmp_path / "nowhere" / "at all"), "domain": "object"}, ["church"])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--suite shapes judges the embedded pipeline's images"):
        load({"kind": "world", "model": "shapes"}, []).detect([Image.new("RGB", (64, 64))])
