"""What an embedded pipeline draws, and who can tell: the interface of a world."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor


class Classifier(Protocol):
    """Names what images show."""

    def name(self, images: Tensor) -> list[dict[str, str]]:
        """Of images `[B, 3, H, W]` in [0, 1] each one's labels, by domain."""


class World(ABC):
    """A small world of its own: a pipeline that ships with the package, its words, and a classifier of its images."""

    name: ClassVar[str]  # of --model
    pipeline: ClassVar[Path]
    image_size: ClassVar[int]  # pixels a side
    attributes: ClassVar[dict[str, tuple[str, ...]]]  # by domain, every label that an image can have
    captions: ClassVar[tuple[str, ...]]  # templates of the captions that the pipeline was trained on

    @property
    def about(self) -> str:
        """For messages."""
        return f"the embedded {self.name} pipeline"

    @abstractmethod
    def attributes_in(self, text: str) -> dict[str, str]:
        """The labels that `text` names, by domain."""

    @abstractmethod
    def prompt(self, named: dict[str, str], template: str = "a {}") -> str:
        """The caption for these labels; "" for none."""

    @abstractmethod
    def full_prompts(self) -> list[str]:
        """Every prompt that names a label of each domain."""

    @abstractmethod
    def prompt_templates(self, texts: list[str]) -> list[Callable[[str], str]]:
        """Ways to say something, alone and beside what none of `texts` names: of "" for nothing, too."""

    @abstractmethod
    def retain_prompts(self) -> list[str]:
        """The built-in list of prompts that stay."""

    @abstractmethod
    def attributed(self, thing: str) -> list[str]:
        """`thing` with each label of the domains that it does not name."""

    @abstractmethod
    def load_classifier(self) -> Classifier:
        """The classifier that ships with the package."""
