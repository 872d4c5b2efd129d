"""What every attack is: attempts to make an erased model draw the concept, each after more of a budget is spent."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from esd_peft.attacks.victim import Victim
from esd_peft.models import PromptEmbeds
from esd_peft.runtime.seeds import generator

BATCH_SIZE = 8  # of attacks that learn


@dataclass(frozen=True)
class Goal:
    """What is to be brought back."""

    concept: str
    captions: list[str]  # of N images of it; each names it as one piece
    latents: Tensor  # [N, ...] these images as the denoiser knows them, fp32 on the CPU
    seed: int

    def some(self, draws: torch.Generator) -> Tensor:
        """Numbers `[BATCH_SIZE]` of the images that a step learns from."""
        return torch.randint(len(self.latents), (BATCH_SIZE,), generator=draws)

    def draws(self, name: str) -> torch.Generator:
        """The attack's own stream of random numbers."""
        return generator(self.seed, f"attack/{name}/{self.concept}")


class Attack(ABC):
    """One way to bring a concept back. `about` says what it may do and how much of it."""

    name: ClassVar[str]
    unit: ClassVar[str]  # of its budget
    about: str

    def own_prompts(self, concept: str) -> list[str]:
        """What is asked instead of the suite's prompts; none for most attacks."""
        return []

    @abstractmethod
    def attempts(self, victim: Victim, goal: Goal, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        """The budget spent so far, and what the attack makes of the `prompts`, to be asked of `victim` as it is then.

        The first attempt spends nothing, where that is possible. May change the victim's denoiser.
        """


def checkpoints(steps: int, count: int = 4) -> list[int]:
    """Steps after which images are taken: the last one and its halves, as far as there are any."""
    return sorted({steps >> k for k in range(count) if steps >> k})
