"""Metrics of two sets of images with the same prompts and noise."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from esd_peft._version import __version__
from esd_peft.errors import UserError
from esd_peft.evaluation.clip import Clip
from esd_peft.evaluation.detectors import Detector, Judge, NudeNet, load_detector
from esd_peft.evaluation.distributions import Features, fid, kid
from esd_peft.evaluation.image_cache import ImageStore
from esd_peft.evaluation.intervals import bootstrap_mean
from esd_peft.evaluation.pretrained import describe_version
from esd_peft.evaluation.result import Measure, Score
from esd_peft.evaluation.similarity import LPIPS_SIZE, Lpips, pixel_distances
from esd_peft.evaluation.suites import Roles, Suite
from esd_peft.io.images import checked_images, open_image
from esd_peft.models.sampling import SampleIndex
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.worlds.world import Prompt

CONCEPT_PROMPTS, OTHER_PROMPTS = "concept prompts", "other prompts"
HALVES = ("before", "after")


@dataclass
class Metrics:
    """The detector and other metrics.

    They are loaded before images are drawn, so that a missing one costs no work, but moved to the device only afterwards.
    """

    detector: Detector | None = None
    clip: Clip | None = None
    lpips: Lpips | None = None
    features: Features | None = None
    reference: list[Path] = field(default_factory=list)  # images to compare features with

    @classmethod
    def of_suite(cls, suite: Suite, prompts: list[Prompt], threshold: float = 0.6) -> "Metrics":
        """Return the suite's detector, without other metrics. Raises `UserError` if its model is missing."""
        labels = list(dict.fromkeys(label for prompt in prompts for label in prompt.labels.values()))
        return cls(load_detector(suite.detector, labels, threshold) if suite.detector else None)

    def to(self, device: torch.device) -> None:
        """Move all networks to `device`."""
        for metric in (self.detector, self.clip, self.lpips, self.features):
            if metric is not None:
                metric.to(device)


@dataclass
class Findings:
    """Scores of every image, in the order of the places."""

    labels: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {half: [] for half in HALVES})
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {half: {} for half in HALVES})
    clip: dict[str, list[float]] = field(default_factory=lambda: {half: [] for half in HALVES})
    features: dict[str, list[Tensor]] = field(default_factory=lambda: {half: [] for half in HALVES})
    pixels: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)


def load_metrics(config: EvaluateConfig, suite: Suite, prompts: list[Prompt]) -> Metrics:
    """Load the metrics of the config. Raises `UserError` if a model, a package or the reference images are missing."""
    reference = checked_images(config.reference, "--reference") if config.reference else []
    if len(reference) == 1:
        raise UserError(f"--reference {config.reference} holds one image; FID and KID need a set")
    return dataclasses.replace(
        Metrics.of_suite(suite, prompts, config.threshold),
        clip=Clip(config.clip) if config.clip else None,
        lpips=Lpips() if config.lpips else None,
        features=Features(config.features) if config.features else None,
        reference=reference,
    )


def score(
    metrics: Metrics,
    prompts: list[Prompt],
    before: ImageStore,
    after: ImageStore,
    places: list[SampleIndex],
    batch_size: int,
) -> Findings:
    """Score every image with every metric, a batch at a time."""
    findings = Findings()
    for start in tqdm(range(0, len(places), batch_size), desc="judge", leave=False):
        batch = places[start : start + batch_size]
        images = {half: [store.read(p) for p in batch] for half, store in zip(HALVES, (before, after), strict=True)}
        findings.pixels += pixel_distances(images["before"], images["after"])
        if metrics.lpips:
            findings.lpips += metrics.lpips.distances(images["before"], images["after"])
        for half in HALVES:
            _score_batch(metrics, findings, half, images[half], [prompts[i].text for i, _ in batch])
    return findings


def _score_batch(metrics: Metrics, findings: Findings, half: str, images: list[Image.Image], texts: list[str]) -> None:
    if metrics.detector:
        findings.labels[half] += metrics.detector.detect(images)
    if isinstance(metrics.detector, NudeNet):
        for name, count in metrics.detector.take_counts().items():
            findings.counts[half][name] = findings.counts[half].get(name, 0) + count
    if metrics.clip:
        findings.clip[half] += metrics.clip.scores(images, texts)
    if metrics.features:
        findings.features[half].append(metrics.features.of(images))


def measures(metrics: Metrics, findings: Findings, roles: Roles, places: list[SampleIndex], seed: int) -> list[Measure]:
    """Return CLIP score, LPIPS, pixel distance, FID and KID, as far as the config asks for them."""
    concept_rows = {i for rows in roles.concept_prompts.values() for i in rows}
    groups = {
        CONCEPT_PROMPTS: [n for n, (i, _) in enumerate(places) if i in concept_rows],
        OTHER_PROMPTS: [n for n, (i, _) in enumerate(places) if i not in concept_rows],
    }

    def scored(values: list[float], rows: list[int]) -> Score:
        here = [values[n] for n in rows]
        return Score(sum(here) / len(here), bootstrap_mean(here, seed), len(here))

    def grouped(columns: dict[str, list[float]]) -> dict[str, dict[str, Score]]:
        return {g: {name: scored(v, rows) for name, v in columns.items()} for g, rows in groups.items() if rows}

    results = []
    if metrics.clip:
        judge = Judge(
            "CLIP score", f"{metrics.clip.name}, {describe_version(metrics.clip.model)}", "100 · cos(image, prompt)"
        )
        results.append(Measure(judge, grouped(findings.clip)))
    if metrics.lpips:
        judge = Judge("LPIPS", f"AlexNet, lpips {metrics.lpips.version}", f"same seed, {LPIPS_SIZE}² pixels; 0 is the same")
        results.append(Measure(judge, grouped({"distance": findings.lpips})))
    judge = Judge("Pixel distance", f"esd_peft {__version__}", "same seed, root mean square, 0 to 1")
    results.append(Measure(judge, grouped({"distance": findings.pixels})))
    if metrics.features:
        results.append(_distribution(metrics.features, metrics.reference, findings))
    return results


def _distribution(features: Features, paths: list[Path], findings: Findings) -> Measure:
    reference = torch.cat([features.of([open_image(path, "--reference")]) for path in paths])  # of any sizes
    halves = {half: torch.cat(parts) for half, parts in findings.features.items()}
    kinds: dict[str, Callable[[Tensor, Tensor], float]] = {"FID": fid, "KID": kid}
    judge = Judge(
        "FID and KID", f"{features.name}, {features.version}", f"against {len(reference)} images; not Inception's figures"
    )
    return Measure(
        judge,
        {
            name: {half: Score(distance(drawn, reference), None, len(drawn)) for half, drawn in halves.items()}
            for name, distance in kinds.items()
        },
    )
