"""A blinded rating page and its key, made from folders of images."""

import base64
import hashlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from esd_peft.io.images import image_bytes, image_files, open_image
from esd_peft.io.jobs import lock_output
from esd_peft.io.outputs import check_output, new_directory
from esd_peft.io.text import shown
from esd_peft.options.study import MakeStudyConfig, condition_name

PAGE, KEY = "study.html", "key.json"
_STUDY = "a study"  # kind of the directory
_REFERENCE_SIZE = 384  # pixels
_QUALITY = 90


def make_study(config: MakeStudyConfig) -> dict[str, Any]:
    """Write `study.html`, which reveals no condition, and `key.json`, which lists them.

    Images are scaled and encoded again, so that no file name, size, format or metadata reveals a condition. Each rater has a
    separate random order.

    Returns the key. Raises `UserError` for folders without images and for files that are not images.
    """
    with lock_output(config.output):
        check_output(config.output, _STUDY, config.overwrite, [*config.condition, config.reference])
        return _make(config)


def _make(config: MakeStudyConfig) -> dict[str, Any]:
    chosen = _choose(config)
    order = np.random.default_rng(config.seed).permutation(len(chosen))
    study = _name_of(config, chosen)
    items: list[dict[str, str]] = []
    key: dict[str, dict[str, str]] = {}
    for place in order:
        condition, path = chosen[place]
        name = hashlib.sha256(f"{study}/{len(items)}".encode()).hexdigest()[:10]
        items.append({"id": name, "image": _data_uri(path, config.max_size, "--condition")})
        key[name] = {"condition": condition, "file": shown(path.name)}
    references = image_files(config.reference, "--reference") if config.reference else []
    page = {
        "study": study,
        "question": config.question,
        "low": config.low,
        "high": config.high,
        "reference": [_data_uri(path, _REFERENCE_SIZE, "--reference") for path in references],
        "items": items,
    }
    conditions = [*map(condition_name, config.condition)]
    record = {"study": study, "question": config.question, "conditions": conditions, "items": key}
    with new_directory(config.output, _STUDY, config.overwrite) as draft:
        (draft / PAGE).write_text(_render(page), encoding="utf-8")
        (draft / KEY).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _choose(config: MakeStudyConfig) -> list[tuple[str, Path]]:
    """Condition and file of each image in the study."""
    random = np.random.default_rng(config.seed)
    chosen = []
    for folder in config.condition:
        paths = image_files(folder, "--condition")
        count = min(config.per_condition or len(paths), len(paths))
        picked = sorted(random.choice(len(paths), count, replace=False))
        chosen += [(condition_name(folder), paths[i]) for i in picked]
    return chosen


def _name_of(config: MakeStudyConfig, chosen: list[tuple[str, Path]]) -> str:
    """The same for the same study, so that answers are matched with their key, and the ids in it cannot be guessed."""
    settings = [config.question, config.low, config.high, str(config.seed), str(config.max_size)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for _, path in chosen:
        digest.update(hashlib.sha256(image_bytes(path, "--condition")).digest())
    return digest.hexdigest()[:12]


def _data_uri(path: Path, size: int, option: str) -> str:
    image = open_image(path, option)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    image.save(encoded, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(encoded.getvalue()).decode()


def _render(page: dict[str, Any]) -> str:
    """The page with its data as JSON that no text in it can break out of; the script shows texts as text only."""
    data = json.dumps(page, ensure_ascii=False).replace("<", "\\u003c")
    return (files("esd_peft.study") / "page.html").read_text(encoding="utf-8").replace("STUDY_DATA", data, 1)
