"""Write what an evaluation found: report.html (with its images, one file), report.md and result.json."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from esd_peft.evaluation import pages
from esd_peft.evaluation.image_cache import ImageCache
from esd_peft.evaluation.plots import attack_success, erasure_against_preservation
from esd_peft.evaluation.result import Evaluation
from esd_peft.evaluation.suites import Roles
from esd_peft.evaluation.tables import tables
from esd_peft.evaluation.text import MARKS, as_markdown
from esd_peft.io.outputs import new_file
from esd_peft.runtime.seeds import generator
from esd_peft.worlds.world import Prompt

SHOWN, SHOWN_SEEDS = 6, 2  # prompts of each kind, and images of each
_SIZE = 256  # pixels
REPORT = ("result.json", "report.md", "report.html")
Figure = dict[str, Any]  # a prompt, and its images before and after


def write_report(
    output: Path, result: Evaluation, prompts: list[Prompt], roles: Roles, before: ImageCache, after: ImageCache
) -> None:
    """Three files in `output`. The HTML needs no network; Jinja escapes every text in it."""
    seed = result.config["seed"]
    figures = {
        f"Asked for: {concept}": _figures(rows, prompts, result.seeds, before, after, seed)
        for concept, rows in roles.concept_prompts.items()
    }
    figures["Asked for something else"] = _figures(roles.other_prompts, prompts, result.seeds, before, after, seed)
    with new_file(output / "result.json") as draft:
        draft.write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with new_file(output / "report.md") as draft:
        draft.write_text(as_markdown(result), encoding="utf-8")
    with new_file(output / "report.html") as draft:
        draft.write_text(render(result, figures), encoding="utf-8")


def render(result: Evaluation, figures: dict[str, list[Figure]]) -> str:
    """The HTML page."""
    return pages.render(
        "report.html",
        result=result,
        tables=tables(result),
        figures={title: shown for title, shown in figures.items() if shown},
        plot=erasure_against_preservation(result.accuracies) if result.accuracies else None,
        attack_plot=attack_success(result.attacks) if result.attacks else None,
        marks=MARKS,
        config=yaml.safe_dump(result.config, sort_keys=False, allow_unicode=True),
    )


def _figures(
    rows: list[int], prompts: list[Prompt], seeds: int, before: ImageCache, after: ImageCache, seed: int
) -> list[Figure]:
    """A few prompts, drawn at random and not chosen by what they show."""
    drawn = torch.randperm(len(rows), generator=generator(seed, "shown"))[:SHOWN].sort().values.tolist()
    return [
        {
            "prompt": prompts[rows[n]].text or "(nothing)",
            "before": [_data_uri(before.read((rows[n], k))) for k in range(min(seeds, SHOWN_SEEDS))],
            "after": [_data_uri(after.read((rows[n], k))) for k in range(min(seeds, SHOWN_SEEDS))],
        }
        for n in drawn
    ]


def _data_uri(image: Image.Image) -> str:
    image.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()
