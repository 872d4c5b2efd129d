"""From two albums of the same pictures to rates and measures."""

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
from esd_peft.evaluation.detectors import About, Detector, NudeNet, load_detector
from esd_peft.evaluation.distributions import Features, fid, kid
from esd_peft.evaluation.image_cache import Album
from esd_peft.evaluation.intervals import bootstrap_mean
from esd_peft.evaluation.options import EvaluateConfig
from esd_peft.evaluation.pretrained import describe_version
from esd_peft.evaluation.rates import Accuracies, accuracies
from esd_peft.evaluation.result import Measure, Score
from esd_peft.evaluation.similarity import LPIPS_SIZE, Lpips, pixel_distances
from esd_peft.evaluation.suites import Prompt, Roles, Suite
from esd_peft.io.images import checked_pictures, open_picture
from esd_peft.models.sampling import Place

ASKING, OTHER = "prompts that ask for it", "other prompts"
HALVES = ("before", "after")


@dataclass
class Judges:
    """Whoever looks at the pictures.

    Loaded before these are made, so that one that is missing costs nothing, but not on the device, where they are made.
    """

    detector: Detector | None
    clip: Clip | None
    lpips: Lpips | None
    features: Features | None
    reference: list[Path]  # pictures to compare features with

    def to(self, device: torch.device) -> None:
        """Move all that is a network."""
        for judge in (self.detector, self.clip, self.lpips, self.features):
            if judge is not None:
                judge.to(device)


@dataclass
class Findings:
    """Of every picture, in the order of the places."""

    seen: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {half: [] for half in HALVES})
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {half: {} for half in HALVES})
    clip: dict[str, list[float]] = field(default_factory=lambda: {half: [] for half in HALVES})
    features: dict[str, list[Tensor]] = field(default_factory=lambda: {half: [] for half in HALVES})
    pixels: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)


def load_judges(config: EvaluateConfig, suite: Suite, prompts: list[Prompt]) -> Judges:
    """Raises `UserError` if a model, a package or the reference pictures are not there."""
    labels = list(dict.fromkeys(label for prompt in prompts for label in prompt.labels.values()))
    reference = checked_pictures(config.reference, "--reference") if config.reference else []
    if len(reference) == 1:
        raise UserError(f"--reference {config.reference} holds one picture; FID and KID need a set")
    return Judges(
        load_detector(suite.detector, labels, config.threshold) if suite.detector else None,
        Clip(config.clip) if config.clip else None,
        Lpips() if config.lpips else None,
        Features(config.features) if config.features else None,
        reference,
    )


def look(
    judges: Judges, prompts: list[Prompt], before: Album, after: Album, places: list[Place], batch_size: int
) -> Findings:
    """Every judge looks at every picture, a batch at a time."""
    found = Findings()
    for start in tqdm(range(0, len(places), batch_size), desc="judge", leave=False):
        batch = places[start : start + batch_size]
        pictures = {half: [album.read(p) for p in batch] for half, album in zip(HALVES, (before, after), strict=True)}
        found.pixels += pixel_distances(pictures["before"], pictures["after"])
        if judges.lpips:
            found.lpips += judges.lpips.distances(pictures["before"], pictures["after"])
        for half in HALVES:
            _look_at(judges, found, half, pictures[half], [prompts[i].text for i, _ in batch])
    return found


def _look_at(judges: Judges, found: Findings, half: str, pictures: list[Image.Image], texts: list[str]) -> None:
    if judges.detector:
        found.seen[half] += judges.detector.see(pictures)
    if isinstance(judges.detector, NudeNet):
        for name, count in judges.detector.take_counts().items():
            found.counts[half][name] = found.counts[half].get(name, 0) + count
    if judges.clip:
        found.clip[half] += judges.clip.scores(pictures, texts)
    if judges.features:
        found.features[half].append(judges.features.of(pictures))


def rates(found: Findings, prompts: list[Prompt], roles: Roles, seeds: int) -> Accuracies:
    """What the detector saw, as rates."""
    halves = ([found.seen[half][i * seeds : (i + 1) * seeds] for i in range(len(prompts))] for half in HALVES)
    return accuracies(prompts, roles, *halves)


def measures(judges: Judges, found: Findings, roles: Roles, places: list[Place], seed: int) -> list[Measure]:
    """CLIP score, LPIPS, pixels, FID and KID, as far as they were asked for."""
    asked = {i for rows in roles.asking.values() for i in rows}
    groups = {
        ASKING: [n for n, (i, _) in enumerate(places) if i in asked],
        OTHER: [n for n, (i, _) in enumerate(places) if i not in asked],
    }

    def scored(values: list[float], rows: list[int]) -> Score:
        here = [values[n] for n in rows]
        return Score(sum(here) / len(here), bootstrap_mean(here, seed), len(here))

    def grouped(columns: dict[str, list[float]]) -> dict[str, dict[str, Score]]:
        return {g: {name: scored(v, rows) for name, v in columns.items()} for g, rows in groups.items() if rows}

    made = []
    if judges.clip:
        about = About(
            "CLIP score", f"{judges.clip.name}, {describe_version(judges.clip.model)}", "100 · cos(picture, prompt)"
        )
        made.append(Measure(about, grouped(found.clip)))
    if judges.lpips:
        about = About("LPIPS", f"AlexNet, lpips {judges.lpips.version}", f"same seed, {LPIPS_SIZE}² pixels; 0 is the same")
        made.append(Measure(about, grouped({"distance": found.lpips})))
    about = About("Pixel distance", f"esd_peft {__version__}", "same seed, root mean square, 0 to 1")
    made.append(Measure(about, grouped({"distance": found.pixels})))
    if judges.features:
        made.append(_distribution(judges.features, judges.reference, found))
    return made


def _distribution(features: Features, paths: list[Path], found: Findings) -> Measure:
    reference = torch.cat([features.of([open_picture(path, "--reference")]) for path in paths])  # of any sizes
    halves = {half: torch.cat(parts) for half, parts in found.features.items()}
    kinds: dict[str, Callable[[Tensor, Tensor], float]] = {"FID": fid, "KID": kid}
    about = About(
        "FID and KID", f"{features.name}, {features.version}", f"against {len(reference)} pictures; not Inception's figures"
    )
    return Measure(
        about,
        {
            name: {half: Score(distance(made, reference), None, len(made)) for half, made in halves.items()}
            for name, distance in kinds.items()
        },
    )
