"""What an embedded pipeline draws, and who can tell: the interface of a world."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import diffusers
import torch
from torch import Tensor

from esd_peft.options.model import GuidanceScale, InferenceSteps

Labels = dict[str, str]  # by domain: {"thing": "fox", "style": "ink"}


class Classifier(Protocol):
    """Names what images show."""

    def name(self, images: Tensor) -> list[Labels]:
        """Of images `[B, 3, H, W]` in [0, 1] each one's labels."""


@dataclass(frozen=True)
class Sampling:
    """How an image is drawn, as far as it is not drawn as the others are."""

    scheduler: str | None = None  # a class of diffusers
    num_inference_steps: InferenceSteps | None = None
    guidance_scale: GuidanceScale | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        """Raises `ValueError` for a scheduler that diffusers does not have."""
        if self.scheduler is not None and not (self.scheduler.endswith("Scheduler") and hasattr(diffusers, self.scheduler)):
            raise ValueError(f"scheduler: diffusers has no {self.scheduler[:50]}; name one of its schedulers")

    @property
    def settings(self) -> dict[str, Any]:
        """What the pipeline is called with, apart from the prompts."""
        given = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its image shall show; no labels where nothing is known."""

    text: str
    labels: Labels = field(default_factory=dict)
    stratum: str = ""  # what it measures (`esd_peft.evaluation.strata`), where that is known,
    about: str = ""  # and of which concept, or which of its labels
    sampling: Sampling = Sampling()


class World(ABC):
    """A small world of its own: a pipeline that ships with the package, its words, and a classifier of its images."""

    name: ClassVar[str]  # of --model
    pipeline: ClassVar[Path]
    image_size: ClassVar[int]  # pixels a side
    attributes: ClassVar[dict[str, tuple[str, ...]]]  # by domain, every label that an image can have

    @property
    def about(self) -> str:
        """For messages."""
        return f"the embedded {self.name} pipeline"

    @abstractmethod
    def attributes_in(self, text: str) -> Labels:
        """The labels that `text` names."""

    @abstractmethod
    def named(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """`count` prompts that name `labels`, in the wordings of the captions, beside labels of other domains."""

    def described(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Up to `count` prompts that ask for `labels` by other names; none where the world has no other names."""
        return []

    def unnamed(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Up to `count` prompts that do not ask for `labels`, whose images may have them all the same."""
        return []

    @abstractmethod
    def neighbours(self, domain: str, label: str) -> list[str]:
        """The labels of the domain that are like `label`, the nearest first."""

    @abstractmethod
    def full_prompts(self) -> list[Prompt]:
        """A prompt for all that the pipeline was made to draw."""

    @abstractmethod
    def rendered(self, count: int, draws: torch.Generator) -> tuple[list[Labels], Tensor]:
        """Random images as the pipeline's training has them: their labels, and pixels `[count, 3, H, W]` in [0, 1]."""

    def prompt_templates(self, texts: list[str]) -> list[Callable[[str], str]] | None:
        """Ways to say something beside what none of `texts` names, of "" for nothing; none: as to other models."""
        return None

    @abstractmethod
    def load_classifier(self) -> Classifier:
        """The classifier that ships with the package."""
