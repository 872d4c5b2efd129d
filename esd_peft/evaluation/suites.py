"""Suites: prompts, the labels their images should show, and the detector. Declared in suites/*.yaml."""

import itertools
import math
import string
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub import hf_hub_download
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from esd_peft.errors import UserError, one_line
from esd_peft.evaluation.prompt_groups import ERASURE_GROUPS, PRESERVATION_GROUPS, group_prompts
from esd_peft.io import text as text_files
from esd_peft.io.paths import exists, is_file
from esd_peft.options.base import check_text
from esd_peft.options.evaluate import Seeds
from esd_peft.options.model import GuidanceScale, InferenceSteps
from esd_peft.prompts.plan import TEMPLATES, mentions, retain_prompts, spread
from esd_peft.worlds import WORLDS, World
from esd_peft.worlds.world import Prompt, Sampling

Words = str | list[str] | dict[str, list[str]]  # a template, a list of labels, or texts for each label
RETAINED = 24  # of the built-in prompts, in suite concept
MOST_PROMPTS = 10**5  # that a suite's lists may make together, and
MOST_IMAGES = 10**6  # that an evaluation may ask for: at one a second, more than eleven days
_FOLDER = files("esd_peft.evaluation") / "suites"


class DetectorSpec(BaseModel):
    """The detector that labels images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["world", "classifier", "clip", "nudenet"]
    model: str | None = None
    """Hub id or folder, of classifier and clip; of world the name of the embedded pipeline."""
    domain: str = ""
    """Domain of its labels: object, artist, ... (as in UnlearnCanvas)."""
    phrase: str = "{}"
    """Text that clip compares with an image; {} is the label."""


class Suite(BaseModel):
    """One YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    prompts: Literal["world", "concept", "file"] | dict[str, Words]
    """world: the prompt groups of an embedded pipeline; concept: the concept in a few templates, and some of the retain set;
    file: --prompts. Or a template and a list for each of its {names}: all combinations. The items of a list are labels, or
    `label: [text, ...]` for labels that prompts express by other texts."""
    role: Literal["named", "erased", "kept"] = "named"
    """named: prompts that name the concept ask for it; erased: all do; kept: none does."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels (domain: label) of every image of the base."""
    detector: DetectorSpec | None = None
    size: Annotated[int, Field(ge=1, le=10**3)] = 12
    """world: prompts of each group."""
    samplings: list[Sampling] = Field(default_factory=list)
    """world: sampler settings of the group `samplers`, used in turn."""
    seeds: Seeds
    num_inference_steps: InferenceSteps | None = None
    guidance_scale: GuidanceScale | None = None
    """Both default to those of the base's family."""

    @model_validator(mode="after")
    def _knows_its_world(self) -> "Suite":
        if (self.prompts == "world" or (self.detector and self.detector.kind == "world")) and self.world is None:
            raise ValueError(f"detector: name an embedded pipeline, {{kind: world, model: {', '.join(WORLDS)}}}")
        return self

    @property
    def world(self) -> World | None:
        """The embedded pipeline that prompts and detector belong to, if any."""
        return WORLDS.get(self.detector.model or "") if self.detector and self.detector.kind == "world" else None

    @property
    def image_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline call, without the prompts."""
        settings = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in settings.items() if value is not None}


def load_suite(name: str) -> Suite:
    """Load the built-in suite `name`, or the YAML file. Raises `UserError` if it is missing or damaged."""
    path = _FOLDER / f"{name}.yaml" if not name.endswith((".yaml", ".yml")) else Path(name)
    if not (is_file(path) if isinstance(path, Path) else path.is_file()):
        available = ", ".join(sorted(p.name.removesuffix(".yaml") for p in _FOLDER.iterdir()))
        raise UserError(f"--suite {name} is not there; use {available}, or a YAML file")
    try:
        return Suite(**text_files.read_yaml(path))
    except (text_files.UnreadableError, TypeError) as error:
        raise UserError(f"--suite {name} cannot be read as a suite: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--suite {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def suite_prompts(suite: Suite, concepts: list[str], source: str | None, preserved: Iterable[str] = ()) -> list[Prompt]:
    """Return the prompts of the suite, in order. `source` is `--prompts`, `preserved` the erasure's preservation prompts.

    Raises `UserError` for a file that is missing, not needed, empty, or without the required columns.
    """
    if (suite.prompts == "file") != (source is not None):
        raise UserError(
            "--prompts FILE.csv is what this --suite needs" if source is None else "--prompts is of no use to this --suite"
        )
    if suite.prompts == "world":
        assert suite.world is not None  # checked with the suite
        return group_prompts(suite.world, concepts, [*retain_prompts(), *preserved], suite.size, suite.samplings)
    if suite.prompts == "concept":
        return _concept_prompts(concepts)
    if isinstance(suite.prompts, dict):
        return _combinations(suite.prompts, suite)
    return [_prompt(row["prompt"], row, suite) for row in read_prompts(source or "", suite)]


def _concept_prompts(concepts: list[str]) -> list[Prompt]:
    if not concepts:
        raise UserError("--concept is missing, and --erased does not say what was erased")
    concept_prompts = [template.format(concept) for concept in concepts for template in TEMPLATES]
    retained = [prompt for prompt in retain_prompts() if not any(mentions(concept, prompt) for concept in concepts)]
    return [Prompt(text) for text in [*concept_prompts, *spread(retained, RETAINED)]]


def _combinations(declared: dict[str, Words], suite: Suite) -> list[Prompt]:
    template, lists = (
        str(declared.get("template", "")),
        {k: _label_texts(v) for k, v in declared.items() if not isinstance(v, str)},
    )
    if math.prod(map(len, lists.values())) > MOST_PROMPTS:  # before they are multiplied
        raise UserError(f"--suite: its lists make more than {MOST_PROMPTS:,} prompts, before --limit chooses; shorten them")
    rows = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    try:
        if any(name not in (None, *lists) or spec or how for _, name, spec, how in string.Formatter().parse(template)):
            raise ValueError("of a list, only its {name} alone")  # no attributes, and no widths, which can be huge
        for part in (template, *(text for words in lists.values() for _, text in words)):
            check_text(part, is_name=False)
        prompts = []
        for row in rows:
            text = template.format(**{k: text for k, (_, text) in row.items()})
            check_text(text, is_name=False)  # a template may repeat its lists
            prompts.append(_prompt(text, {k: v for k, (v, _) in row.items()}, suite))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"--suite: its template {template[:200]!r} does not fit its lists ({error}); mend the file"
        ) from None
    if not template or len({prompt.text for prompt in prompts}) < len(prompts):
        raise UserError(
            f"--suite: its template {template[:200]!r} does not name each of its lists, {', '.join(lists)}; mend the file"
        )
    return prompts


def _label_texts(words: list[str] | dict[str, list[str]]) -> list[tuple[str, str]]:
    """Pair each label of a list with a text that expresses it."""
    return (
        [(v, v) for v in words] if isinstance(words, list) else [(v, text) for v, texts in words.items() for text in texts]
    )


def _prompt(text: str, row: dict[str, str], suite: Suite) -> Prompt:
    domain = suite.detector.domain if suite.detector else ""
    return Prompt(text, suite.labels | ({domain: row[domain]} if row.get(domain) else {}))


def read_prompts(source: str, suite: Suite) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a column `prompt`. Raises `UserError`."""
    try:
        columns, rows = text_files.read_csv(_local(source))
    except text_files.UnreadableError as error:
        raise UserError(f"--prompts {source} cannot be read: {error}") from None
    rows = [row for row in rows if row.get("prompt", "").strip()]
    if "prompt" not in columns:
        raise UserError(f"--prompts {source} has no column prompt; it has {', '.join(columns) or 'none'}")
    if not rows:
        raise UserError(f"--prompts {source} holds no prompt; write one a row")
    return rows


def _local(source: str) -> Path:
    """Return the local file; download OWNER/NAME/FILE from the hub if no such file exists here."""
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if exists(source) or not (owner and name and file):
        return Path(source)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, repo_type="dataset"))
    except Exception as error:  # the hub raises many kinds of errors: offline, no such file, no access
        raise UserError(f"--prompts {source} is no file here and cannot be had from the hub ({one_line(error)})") from None


def select_prompts(
    suite: Suite, concepts: list[str], source: str | None, limit: int | None, preserved: Iterable[str] = ()
) -> tuple[list[Prompt], "Roles"]:
    """Select at most `limit` prompts of each concept, and as many others, with their roles.

    Raises `UserError` as `suite_prompts` and `assign_roles` do.
    """
    if suite.prompts == "world":
        suite = suite.model_copy(update={"size": min(suite.size, limit or suite.size)})
    prompts = suite_prompts(suite, concepts, source, preserved)
    roles = assign_roles(suite, prompts, concepts)
    if suite.prompts != "world":
        chosen = {i for rows in (*roles.concept_prompts.values(), roles.other_prompts) for i in spread(rows, limit)}
        prompts = [prompts[i] for i in sorted(chosen)]
        roles = assign_roles(suite, prompts, concepts)
    if (images := len(prompts) * suite.seeds) > MOST_IMAGES:
        raise UserError(f"--suite asks for {images:,} images, {suite.seeds:,} of each prompt; use --limit or fewer --seeds")
    return prompts, roles


@dataclass(frozen=True)
class Roles:
    """The prompts of each concept, by index, and all other prompts."""

    labels: dict[str, dict[str, str]]  # concept: the labels by which the detector recognises it, by domain
    concept_prompts: dict[str, list[int]]  # concept: indices of the prompts that ask for it
    other_prompts: list[int]


def assign_roles(suite: Suite, prompts: list[Prompt], concepts: list[str]) -> Roles:
    """Assign each prompt to a concept or to the others.

    Raises `UserError` for a concept without a label or a prompt in the suite.
    """
    if suite.role == "kept":
        return Roles({}, {}, list(range(len(prompts))))
    if suite.role == "erased":
        name = ", ".join(concepts) or ", ".join(suite.labels)
        return Roles({name: suite.labels}, {name: list(range(len(prompts)))}, [])
    if not concepts:
        raise UserError("--concept is missing, and --erased does not say what was erased")
    if blank := [concept for concept in concepts if mentions(concept, "")]:
        raise UserError(f"--concept {blank[0]!r} names nothing; say what was erased")
    if suite.prompts == "world" and suite.world is not None:
        return _group_roles(suite.world, prompts, concepts)
    labels = {concept: _labels_of(concept, prompts) for concept in concepts}
    concept_prompts = {c: [i for i, p in enumerate(prompts) if _asks_for(c, labels[c], p)] for c in concepts}
    if missing := [concept for concept, rows in concept_prompts.items() if not rows]:
        raise UserError(
            f"--concept {missing[0]!r}: no prompt of this --suite asks for it; use another suite, or --suite csv"
        )
    assigned = {i for rows in concept_prompts.values() for i in rows}
    return Roles(labels, concept_prompts, [i for i in range(len(prompts)) if i not in assigned])


def _group_roles(world: World, prompts: list[Prompt], concepts: list[str]) -> Roles:
    """Assign roles by prompt group; only unseen groups count."""
    if unknown := [concept for concept in concepts if not world.attributes_in(concept)]:
        raise UserError(_not_in_suite(unknown[0], [label for labels in world.attributes.values() for label in labels]))
    labels = {concept: world.attributes_in(concept) for concept in concepts}
    concept_prompts = {
        c: [i for i, p in enumerate(prompts) if p.subject == c and p.group in ERASURE_GROUPS] for c in concepts
    }
    return Roles(labels, concept_prompts, [i for i, p in enumerate(prompts) if p.group in PRESERVATION_GROUPS])


def _labels_of(concept: str, prompts: list[Prompt]) -> dict[str, str]:
    """Return the labels of the suite that the concept names: the longest one of each domain."""
    suite_labels = {(domain, label) for prompt in prompts for domain, label in prompt.labels.items()}
    named = [(d, label) for d, label in suite_labels if mentions(label, concept) or mentions(concept, label)]
    if suite_labels and not named:
        raise UserError(_not_in_suite(concept, [label for _, label in suite_labels]))
    return dict(sorted(named, key=lambda pair: (len(pair[1]), pair[1])))


def _not_in_suite(concept: str, labels: list[str]) -> str:
    return (
        f"--concept {concept!r} is not in this --suite, which knows {', '.join(sorted(labels))[:300]}; use --suite concept"
    )


def _asks_for(concept: str, labels: dict[str, str], prompt: Prompt) -> bool:
    return labels.items() <= prompt.labels.items() if labels else mentions(concept, prompt.text)
