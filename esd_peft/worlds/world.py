"""The interface of an embedded pipeline: what it draws, and the classifier that recognises it."""

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
SURE = {"confidence": "sure"}  # labels of an image in which a classifier is sure of a thing


class Classifier(Protocol):
    """Labels images."""

    def classify(self, images: Tensor) -> list[Labels]:
        """Return the labels of each of the images `[B, 3, H, W]`, with values in [0, 1], and `SURE` where it is."""


@dataclass(frozen=True)
class Sampling:
    """Sampler settings of an image, where they differ from those of the suite."""

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
        """Return the keyword arguments of the pipeline call, without the prompts."""
        settings = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {name: value for name, value in settings.items() if value is not None}


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the labels that its image should show, as far as they are known."""

    text: str
    labels: Labels = field(default_factory=dict)
    group: str = ""  # key of its prompt group (`esd_peft.evaluation.prompt_groups`), if it has one
    subject: str = ""  # the concept or label that its group measures with it
    sampling: Sampling = Sampling()


class World(ABC):
    """An embedded pipeline that ships with the package, with its vocabulary and a classifier of its images."""

    name: ClassVar[str]  # of --model
    pipeline: ClassVar[Path]
    image_size: ClassVar[int]  # pixels a side
    attributes: ClassVar[dict[str, tuple[str, ...]]]  # by domain, every label that an image can have

    @property
    def about(self) -> str:
        """The pipeline's name in messages."""
        return f"the embedded {self.name} pipeline"

    @abstractmethod
    def attributes_in(self, text: str) -> Labels:
        """Return the labels that `text` names."""

    @abstractmethod
    def paraphrases(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Draw `count` prompts that name `labels` in unseen contexts, with labels of other domains."""

    def synonyms(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Draw up to `count` prompts with synonyms or descriptions of `labels`; none if the world has none."""
        return []

    def implicit(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Draw up to `count` prompts that do not name `labels`, but whose images may show them (implicit concepts)."""
        return []

    def styled(self, labels: Labels, count: int, draws: torch.Generator) -> list[Prompt]:
        """Draw up to `count` prompts that name `labels` beside a style and nothing else; none if the world has no styles."""
        return []

    @abstractmethod
    def neighbours(self, domain: str, label: str) -> list[str]:
        """Return the labels of the domain that resemble `label`, nearest first."""

    @abstractmethod
    def full_prompts(self) -> list[Prompt]:
        """Return a prompt for each image that the pipeline was trained to draw."""

    @abstractmethod
    def rendered(self, count: int, draws: torch.Generator) -> tuple[list[Labels], Tensor]:
        """Draw random training images: their labels, and pixels `[count, 3, H, W]` in [0, 1]."""

    def prompt_templates(self, texts: list[str]) -> list[Callable[[str], str]] | None:
        """Return prompt templates (text to prompt) whose contexts name nothing of `texts`; None: those of other models."""
        return None

    @abstractmethod
    def load_classifier(self) -> Classifier:
        """Load the classifier that ships with the package."""
