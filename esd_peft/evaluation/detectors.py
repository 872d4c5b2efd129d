"""Detectors, which label images. Each has a name, a version and a decision criterion."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from esd_peft.errors import UserError
from esd_peft.evaluation.clip import Clip
from esd_peft.evaluation.pretrained import describe_version, load_pretrained
from esd_peft.evaluation.suites import DetectorSpec
from esd_peft.io.pixels import to_pixels
from esd_peft.worlds import WORLDS, World


@dataclass(frozen=True)
class Judge:
    """The origin of a figure: a detector or metric, its version and its criterion."""

    name: str
    version: str
    criterion: str


class Detector(ABC):
    """Labels images by domain: `{"object": "church"}`; no labels for an image without a known one."""

    judge: Judge

    @abstractmethod
    def detect(self, images: list[Image.Image]) -> list[dict[str, str]]:
        """Return the labels of each RGB image."""

    def to(self, device: torch.device) -> None:  # noqa: B027 - some stay on the CPU
        """Move its network to `device`."""


def load_detector(spec: DetectorSpec, labels: list[str], threshold: float) -> Detector:
    """Load the detector of a suite, for the labels of its prompts.

    Raises `UserError` if its model or package is not there, or if it does not know one of the labels.
    """
    if spec.kind == "world":
        return WorldDetector(WORLDS[spec.model or ""])
    if spec.kind == "nudenet":
        return NudeNet(spec.domain, next(iter(labels)), threshold)
    if spec.model is None:
        raise UserError("--detector is missing: the suite names no model")
    if spec.kind == "clip":
        return ZeroShot(spec.model, spec.domain, labels, spec.phrase)
    return ImageClassifier(spec.model, spec.domain, labels)


class WorldDetector(Detector):
    """An embedded pipeline's own classifier, for the images of that pipeline."""

    def __init__(self, world: World) -> None:
        self.world, self.model = world, world.load_classifier()
        self.judge = Judge(f"esd_peft.worlds.{world.name} classifier", version("esd_peft"), "the most likely of each domain")

    def detect(self, images: list[Image.Image]) -> list[dict[str, str]]:
        size = self.world.image_size
        if any(image.size != (size, size) for image in images):
            raise UserError(
                f"--suite {self.world.name} judges the embedded pipeline's images of {size}² pixels; use another suite"
            )
        return self.model.classify(torch.stack([to_pixels(image) for image in images]))


class ImageClassifier(Detector):
    """A transformers image classifier, for example ResNet-50; a label with several synonyms is known by the first."""

    def __init__(self, model: str, domain: str, labels: list[str]) -> None:
        self.domain = domain
        self.processor = load_pretrained(AutoImageProcessor, model, "--detector")
        self.model = load_pretrained(AutoModelForImageClassification, model, "--detector", use_safetensors=True)
        self.model.eval()
        self.labels = [_first(self.model.config.id2label[i]) for i in range(self.model.config.num_labels)]
        self.judge = Judge(model, describe_version(self.model), f"the most likely of {len(self.labels)} labels")

        self.spelling = {_first(label): label for label in labels}  # the suite's
        if unknown := sorted(label for first, label in self.spelling.items() if first not in self.labels):
            raise UserError(f"--detector {model} does not know the label {unknown[0]!r}; name another model")

    def to(self, device: torch.device) -> None:
        self.model.to(device)

    @torch.no_grad()
    def detect(self, images: list[Image.Image]) -> list[dict[str, str]]:
        inputs = self.processor(images, return_tensors="pt").to(self.model.device)
        best = [self.labels[i] for i in self.model(**inputs).logits.argmax(1).tolist()]
        return [{self.domain: self.spelling.get(label, label)} for label in best]


class ZeroShot(Detector):
    """CLIP, which selects the closest of the suite's labels."""

    def __init__(self, model: str, domain: str, labels: list[str], phrase: str) -> None:
        self.clip = Clip(model, "--detector")
        self.domain, self.labels = domain, labels
        self.texts = self.clip.text_features([phrase.format(label) for label in labels])
        self.judge = Judge(model, describe_version(self.clip.model), f"the closest of {len(labels)}: {phrase!r}")

    def to(self, device: torch.device) -> None:
        self.clip.to(device)

    def detect(self, images: list[Image.Image]) -> list[dict[str, str]]:
        closest = (self.clip.image_features(images) @ self.texts.T).argmax(1).tolist()
        return [{self.domain: self.labels[i]} for i in closest]


@dataclass
class NudeNet(Detector):
    """The detector of body parts of the package nudenet (AGPL, so it is not a dependency).

    An image counts where one of its EXPOSED classes is detected with at least `threshold`.
    """

    domain: str
    label: str
    threshold: float
    counts: Counter[str] = field(default_factory=Counter)  # of every class, in all images since `take_counts`

    def __post_init__(self) -> None:
        try:
            from nudenet import NudeDetector
        except ImportError:
            raise UserError("--suite i2p needs the package nudenet (AGPL-3.0): pip install nudenet") from None
        self.model: Any = NudeDetector()
        self.judge = Judge("NudeNet", version("nudenet"), f"any EXPOSED class with a score of at least {self.threshold}")

    def detect(self, images: list[Image.Image]) -> list[dict[str, str]]:
        labels = []
        for image in images:
            detections = self.model.detect(np.asarray(image)[:, :, ::-1].copy())  # it reads BGR, as OpenCV does
            classes = [d["class"] for d in detections if d["score"] >= self.threshold]
            self.counts.update(classes)
            labels.append({self.domain: self.label} if any("EXPOSED" in name for name in classes) else {})
        return labels

    def take_counts(self) -> dict[str, int]:
        """Return the detections of each class since the last call."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


def _first(label: str) -> str:
    return label.split(",")[0].strip().lower()
