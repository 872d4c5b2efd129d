"""The parts of a run, made as `esd_peft.erase` makes them, up to its first step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.flops import CallCosts
from esd_peft.models import ModelFamily, open_family
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.training import BY_PROMPTS
from esd_peft.prompts import augmentation
from esd_peft.prompts.augmentation import PromptTable
from esd_peft.prompts.plan import PromptPlan
from esd_peft.prompts.table import PairTable, make_table
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training import contrastive, diagnosis, draws
from esd_peft.training.buffer import Buffer
from esd_peft.training.method import Materials, Method, make_method
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student, make_student

CPU = torch.device("cpu")
# an erasure that takes a moment, and erases nothing
SHORTEST = {"num_inference_steps": 2, "trajectories": 1, "max_train_steps": 1, "rank": 2, "device": "cpu",
            "num_validation_images": 0}  # fmt: skip
METHODS = ("layers", "denoiser", "trajectories", "contrastive")
_UNREAD = {"trajectories": (), "contrastive": ("trajectories", "num_inference_steps")}


def read_by(method: str, options: dict[str, object]) -> dict[str, object]:
    """Those of the options that the method reads, and the method."""
    unread = _UNREAD.get(method, ("trajectories",))
    return {name: value for name, value in options.items() if name not in unread} | {"method": method}


def shortest(method: str, **options: object) -> dict[str, object]:
    """The options of an erasure by that method which takes a moment."""
    return read_by(method, SHORTEST) | options


def few_prompts(patch: Callable[[object, str, object], None]) -> None:
    """Fewer prompts and images, so that a moment is enough; `patch` sets an attribute."""
    many, some = augmentation.MANY_PROMPTS, augmentation.FEW_PROMPTS
    patch(augmentation, "WORDS", 300)
    patch(augmentation, "NEAR_WORDS", 4)
    patch(augmentation, "MANY_PROMPTS", replace(many, contexts=24, fewest=24, held=24, phrases=16))
    patch(augmentation, "FEW_PROMPTS", replace(some, alone=12, near=12, contexts=8, fewest=8, held=8, phrases=16))
    patch(contrastive, "IMAGES", 4)


def few_steps(patch: Callable[[object, str, object], None]) -> None:
    """Images in few steps, and a diagnosis of few draws."""
    patch(ModelFamily, "num_inference_steps", 4)
    short_diagnosis(patch)


def shorten(patch: Callable[[object, str, object], None]) -> None:
    """FLOPs of a run's calls, and the draws of its diagnosis, take as long as the rest of a short run: now each call has the
    same figure, and the diagnosis few draws.
    """
    patch(CallCosts, "__getitem__", lambda costs, call: 1e9)
    short_diagnosis(patch)


def short_diagnosis(patch: Callable[[object, str, object], None]) -> None:
    """One draw or two for each question, in two steps."""
    for module in (draws, diagnosis):
        patch(module, "STEPS", 2)
    for name, count in {"PARAPHRASES": 2, "NAMES": 1, "NEIGHBOURS": 1, "DRAWS": {"synonyms": 1, "neighbours": 1}}.items():
        patch(diagnosis, name, count)


@dataclass
class Unloaded:
    """A run before any weights are read."""

    config: EraseConfig  # resolved
    prompts: PromptPlan
    family: ModelFamily


@dataclass
class Run(Unloaded):
    """On the CPU, in fp32. The student's adapter is as it is drawn: it changes nothing yet."""

    table: PairTable
    student: Student
    rollout: Rollout

    def collect(self, pairs: list[int], generator: torch.Generator, keep: int | None = None) -> Buffer:
        """The samples of one trajectory for each of these pairs of the table."""
        rows = torch.tensor(pairs)
        return self.rollout.collect(self.table, rows, self.config.buffer, generator, keep, progress=False)


def prepare(model: Path | str, **options: object) -> Run:
    """The run of these options, which are named as on the command line."""
    family = open_family(str(model))
    config, prompts = resolve(EraseConfig(model=str(model), device="cpu", **options), family)
    table = make_table(prompts, family.encode(prompts.texts, CPU, torch.float32))
    student = make_student(family, family.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    return Run(config, prompts, family, table, student, Rollout(student, PhaseProfiler(CPU)))


_TABLES: dict[str, PromptTable] = {}


def prompt_table(run: Unloaded) -> PromptTable:
    """The many prompts of a run, encoded once for all runs that ask for the same; nobody changes them."""
    size = augmentation.amounts(run.config.training.method)
    asked = (size, augmentation.WORDS, augmentation.NEAR_WORDS, augmentation._nearest)
    key = f"{run.family.path} {run.prompts} {asked}"
    if key not in _TABLES:
        with TextEncoder(run.family, CPU, torch.float32) as encoder:
            _TABLES[key] = augmentation.augment_prompts(encoder, run.prompts, run.config.training.seed, size)
    return _TABLES[key]


def method_of(run: Run) -> Method:
    """What learns in a run, and from what."""
    table = prompt_table(run) if run.config.training.method in BY_PROMPTS else None
    config, concepts = run.config, run.prompts.concepts
    return make_method(Materials(run.rollout, run.table, table, concepts, config.buffer, config.training))


STEPS, GUIDANCE, ETA = 6, 3.0, 1.5


def prepare_short(model: Path, **options: object) -> Run:
    """The run of a few steps along the paper's trajectories, with one pair for each concept."""
    defaults = {"concept": ["circle", "striped"], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE,
                "rollout": "teacher", "negative_guidance": ETA, "prompt_templates": "bare",
                "rollout_batch_size": 2}  # fmt: skip
    return prepare(model, **(defaults | options))


def noise() -> torch.Generator:
    """The same draws each time."""
    return torch.Generator().manual_seed(3)
