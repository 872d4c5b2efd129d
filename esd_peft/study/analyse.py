"""Analysis of raters' answers with the key: means, intervals and agreement."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.errors import UserError
from esd_peft.evaluation.intervals import percentiles, resample
from esd_peft.io import marks
from esd_peft.io.jobs import lock_output
from esd_peft.io.outputs import check_new_file, new_file
from esd_peft.io.paths import is_file
from esd_peft.io.text import UnreadableError, read_csv, read_json
from esd_peft.options.study import AnalyseStudyConfig
from esd_peft.study.agreement import krippendorff_alpha

SCALE = (1, 2, 3, 4, 5)
COLUMNS = ("study", "rater", "item", "rating")
_Text = Annotated[str, Field(min_length=1)]


class _Item(TypedDict):
    condition: str


class _Key(TypedDict):
    study: _Text
    question: _Text
    conditions: Annotated[list[str], Field(min_length=1)]
    items: dict[str, _Item]


def analyse_study(config: AnalyseStudyConfig) -> dict[str, Any]:
    """Means of each condition, their differences from the first one, and the raters' agreement.

    Intervals come from resampling raters and images, independently of each other and both with replacement (the
    pigeonhole bootstrap: Owen 2007, "The pigeonhole bootstrap"), because each of them would be others in another study.

    Raises `UserError` for answers that do not belong to the key, or are no ratings from 1 to 5.
    """
    if config.output is None:
        return _analyse(config)
    with lock_output(config.output):
        kind = f"the analysis of study {_read_key(config.key)['study']}"
        check_new_file(config.output, kind, overwrite=True, inputs=[config.key, *config.answers])
        result = _analyse(config)
        with new_file(config.output, standalone=True) as draft:
            signed = marks.signed(result, kind)
            draft.write_text(json.dumps(signed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _analyse(config: AnalyseStudyConfig) -> dict[str, Any]:
    key = _read_key(config.key)
    ratings: dict[str, dict[str, int]] = {}  # rater: image: rating
    for path in config.answers:
        for rater, ratings_of_rater in _read_answers(path, key).items():
            if rater in ratings:
                raise UserError(f"--answers {path}: another file holds answers of {rater}; leave one of them out")
            ratings[rater] = ratings_of_rater
    items = list(key["items"])
    table = np.array([[ratings_of_rater.get(item, np.nan) for item in items] for ratings_of_rater in ratings.values()])
    conditions = np.array([key["items"][item]["condition"] for item in items])
    random = np.random.default_rng(config.seed)
    raters = resample(len(table), random)
    means, draws = {}, {}
    for name in key["conditions"]:
        here = table[:, conditions == name]
        if np.isnan(here).all():
            raise UserError(f"--answers: nobody rated a picture of {name}; wait for more answers")
        draws[name] = _resampled_means(here, raters, random)
        means[name] = float(np.nanmean(here))
    first, *rest = key["conditions"]
    return {
        "study": key["study"],
        "question": key["question"],
        "raters": len(table),
        "ratings": int((~np.isnan(table)).sum()),
        "conditions": {
            name: {
                "mean": means[name],
                "interval": percentiles(draws[name]),
                "images": int((conditions == name).sum()),
                "ratings": [int((table[:, conditions == name] == value).sum()) for value in SCALE],
            }
            for name in key["conditions"]
        },
        "differences": {
            f"{name} - {first}": {
                "mean": means[name] - means[first],
                "interval": percentiles(draws[name] - draws[first]),
            }
            for name in rest
        },
        "krippendorff_alpha": {"ordinal": krippendorff_alpha(table), "interval": krippendorff_alpha(table, "interval")},
    }


def _resampled_means(ratings: np.ndarray, raters: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Means of `[raters, images]` under how often each rater `[draws, raters]` and each image is drawn: `[draws]`."""
    images = resample(ratings.shape[1], random)
    total = (raters @ np.nan_to_num(ratings) * images).sum(1)
    count = (raters @ ~np.isnan(ratings) * images).sum(1)
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def _read_key(path: Path) -> dict[str, Any]:
    if not is_file(path):
        raise UserError(f"--key {path} cannot be read: no such file; name the key.json that was written with the page")
    try:
        key: dict[str, Any] = read_json(path)
        TypeAdapter(_Key).validate_python(key, strict=True)
        if {item["condition"] for item in key["items"].values()} != {*key["conditions"]}:
            raise UnreadableError("it lists other conditions")
    except (UnreadableError, ValidationError):
        raise UserError(f"--key {path} is no key of a study; name the key.json that was written with the page") from None
    return key


def _read_answers(path: Path, key: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Rater: image: rating. Raises `UserError` unless all of them are of this study."""
    try:
        columns, rows = read_csv(path)
    except UnreadableError as error:
        raise UserError(f"--answers {path} cannot be read: {error}") from None
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise UserError(f"--answers {path} has no column {missing[0]}; name a CSV file that the page saved")
    if not rows:
        raise UserError(f"--answers {path} holds no answer; leave it out")
    found: dict[str, dict[str, int]] = {}
    for line, row in enumerate(rows, 2):
        if row["study"] != key["study"] or row["item"] not in key["items"]:
            raise UserError(f"--answers {path}, line {line}: this is an answer to another study than --key's")
        if row["rating"] not in map(str, SCALE):
            raise UserError(f"--answers {path}, line {line}: the rating {row['rating']!r} is not one of 1 to 5; mend it")
        ratings_of_rater = found.setdefault(row["rater"], {})
        if row["item"] in ratings_of_rater:
            raise UserError(
                f"--answers {path}, line {line}: {row['rater']} rated {row['item']} twice; leave one of them out"
            )
        ratings_of_rater[row["item"]] = int(row["rating"])
    return found


def study_table(result: dict[str, Any]) -> str:
    """Format the result of `analyse_study` for the terminal."""
    width = max(map(len, [*result["conditions"], *result["differences"], "condition"])) + 2
    lines = [result["question"], "", f"{'condition':<{width}} mean   95 % interval   ratings of 1, 2, 3, 4, 5"]
    for name, found in result["conditions"].items():
        counts = ", ".join(map(str, found["ratings"]))
        lines.append(f"{name:<{width}}{found['mean']:>5.2f}   {_interval(found):<15} {counts}")
    lines += [
        f"{name:<{width}}{found['mean']:>+5.2f}   {_interval(found, '+')}" for name, found in result["differences"].items()
    ]
    alpha = ", ".join(f"{'not defined' if a is None else f'{a:.3f}'} ({k})" for k, a in result["krippendorff_alpha"].items())
    lines += ["", f"{result['raters']} raters, {result['ratings']} ratings; Krippendorff's alpha {alpha}"]
    return "\n".join(lines)


def _interval(found: dict[str, Any], sign: str = "") -> str:
    low, high = found["interval"]
    return f"{low:{sign}.2f} to {high:{sign}.2f}"
