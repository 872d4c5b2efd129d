"""Compare the diagnosis at the end of a run with a classifier of images.

    python benchmarks/diagnosis.py ADAPTER... --output benchmarks/results/diagnosis

Each ADAPTER of the embedded emoji pipeline, as `python -m esd_peft.erase` wrote it, acts at several strengths, so that it
erases and harms more or less. At each the diagnosis is made, and the classifier that ships with the pipeline names what
images of other prompts show. A row is a concept or a neighbour at one strength; questions have Spearman's correlation. It
needs scipy.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from scipy.stats import spearmanr

from esd_peft.adapters.saved import read_adapter
from esd_peft.models import ModelFamily, open_family
from esd_peft.models.sampling import encode_prompts, image_batches
from esd_peft.options.erase import EraseConfig
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.augmentation import Candidate
from esd_peft.prompts.plan import plan_prompts
from esd_peft.training.diagnosis import NEIGHBOURS, TEMPLATES, Diagnosis, choose_probes, diagnose
from esd_peft.training.student import Student
from esd_peft.training.synonyms import SynonymMatch

CPU, STRENGTHS, IMAGES = torch.device("cpu"), (0.35, 0.6, 1.0), 8


class Saved(Student):
    """A saved adapter at some strength beside its base."""

    def __init__(self, family: ModelFamily, base: ModelMixin, erased: ModelMixin) -> None:
        super().__init__(family, erased, CPU, torch.float32)
        self.base, self.erased = base, erased

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        self.denoiser = self.base
        try:
            yield
        finally:
            self.denoiser = self.erased

    scaled = start_from = project = save = None  # type: ignore[assignment]  # nothing is trained


def neighbours_of(family: ModelFamily, concept: str) -> list[str]:
    """The labels that share a word with the concept, then its neighbours."""
    assert family.world is not None
    (domain, label), *_ = family.world.attributes_in(concept).items()
    shared = [o for o in family.world.attributes[domain] if o != label and {*o.split()} & {*label.split()}]
    return [*dict.fromkeys(shared + family.world.neighbours(domain, label))][:NEIGHBOURS]


def classifier_rates(
    student: Student, prompts: dict[str, list[str]], wanted: dict[str, str], negative: str = "", **settings: float
) -> dict[str, float]:
    """The share of one image of each prompt that shows the wanted label, by group."""
    family = student.family
    assert family.world is not None
    texts = [text for group in prompts.values() for text in group]
    encoded = encode_prompts(family, texts, CPU, torch.float32, [negative] if negative else [])
    pipe = family.pipeline(student.denoiser, CPU, torch.float32)
    places = [(i, 0) for i in range(len(texts))]
    batches = image_batches(pipe, encoded, places, 32, 5, "calibration", negative=negative, **settings)
    labels = family.world.load_classifier().name(torch.cat([images for _, images in batches]))
    rates, start = {}, 0
    for key, group in prompts.items():
        some = labels[start : start + len(group)]
        rates[key] = sum(wanted[key] in found.values() for found in some) / len(group)
        start += len(group)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--strengths", nargs="+", type=float, default=STRENGTHS, help="of each adapter")
    parser.add_argument("--output", type=Path, required=True, help="without a suffix: .json and .png are written")
    arguments = parser.parse_args()
    file = arguments.output.with_suffix(".json")
    rows = json.loads(file.read_text())["rows"] if file.is_file() else []
    for path in arguments.adapters:
        if any(row["adapter"] == path.name for row in rows):
            continue
        rows += measure(path, arguments.strengths)
        write(file, rows)
    write(file, rows)


def measure(path: Path, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of one adapter."""
    family = open_family("emoji")
    assert family.world is not None
    concept, made = read_adapter(path).concepts[0], []
    plan = plan_prompts(EraseConfig(concept=concept).prompts, family.world)
    near = neighbours_of(family, concept)
    probes = choose_probes(family, plan, None, seed=1)
    probes.contexts = {f"a {name}": [template.format(f"a {name}") for template in TEMPLATES[:2]] for name in near}
    probes.texts.add(probes.all, family.encode(probes.all, CPU, torch.float32))
    match = SynonymMatch([], [Candidate(f"a {name}", [], True) for name in near])
    draws = torch.Generator().manual_seed(11)
    labels = family.world.attributes_in(concept)
    (domain, label), *_ = labels.items()
    prompts = {concept: [p.text for p in family.world.named(labels, 24, draws)]}
    prompts |= {name: [p.text for p in family.world.named({domain: name}, IMAGES, draws)] for name in near}
    wanted = {concept: label} | {name: name for name in near}
    # prompts that say little, at a guidance scale at which negative prompts do much
    open_prompts = {concept: ["", "a picture", *(f"a {name}" for name in near[:2])] * 6}
    base = family.load_denoiser(torch.float32)
    options = BufferOptions(guidance_scale=3.0)
    teacher = Saved(family, base, base)
    before = classifier_rates(teacher, prompts, wanted)
    for strength in strengths:
        erased = read_adapter(path, strength).apply(family.load_denoiser(torch.float32))
        student, start = Saved(family, base, erased), time.process_time()
        found: Diagnosis = diagnose(student, probes, [match], options, seed=1)
        seconds = time.process_time() - start
        after = classifier_rates(student, prompts, wanted)
        negative = classifier_rates(student, open_prompts, {concept: label}, negative=concept, guidance_scale=7.5)
        common = {"adapter": path.name, "concept": concept, "strength": strength, "nfe": found.nfe, "cpu_seconds": seconds}
        for shown in found.paraphrases.values():
            made.append(common | {"question": "paraphrases", "subject": concept, "before": before[concept],
                                  "classifier": after[concept], "diagnosis": shown.after / shown.count})  # fmt: skip
        made.append(common | {"question": "negative prompt", "subject": concept, "classifier": negative[concept]})
        for text, shown in found.neighbours.items():
            name = text.removeprefix("a ")
            lost = before[name] - after[name], max(0.0, shown.before - shown.after) / shown.count
            made.append(common | {"question": "neighbours", "subject": name, "classifier": lost[0], "diagnosis": lost[1]})
    return made


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """Rows and correlations."""
    found = {}
    for question in ("paraphrases", "neighbours"):
        some = [row for row in rows if row["question"] == question]
        rank = _rank([r["classifier"] for r in some], [r["diagnosis"] for r in some])
        found[question] = {"rows": len(some), "spearman": rank}
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        if row["question"] == "neighbours":
            runs.setdefault((row["adapter"], row["strength"]), []).append(row)
    worst = [[max(r[key] for r in some) for some in runs.values()] for key in ("classifier", "diagnosis")]
    found["worst neighbour of a run"] = {"rows": len(runs), "spearman": _rank(*worst)}
    file.write_text(json.dumps({"correlation": found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def _rank(first: list[float], second: list[float]) -> float | None:
    value = float(spearmanr(first, second).statistic) if len(first) > 2 else float("nan")
    return None if value != value else round(value, 3)


if __name__ == "__main__":
    main()
