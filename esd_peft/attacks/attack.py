"""The interface of attacks: attempts to make an erased model draw the concept, at increasing budgets."""

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
class AttackTarget:
    """The concept to bring back, with images of it."""

    concept: str
    captions: list[str]  # of N images of the concept; each contains its name
    latents: Tensor  # [N, ...] these images as the denoiser knows them, fp32 on the CPU
    seed: int

    def some(self, draws: torch.Generator) -> Tensor:
        """Draw the indices `[BATCH_SIZE]` of the images of a training step."""
        return torch.randint(len(self.latents), (BATCH_SIZE,), generator=draws)

    def draws(self, name: str) -> torch.Generator:
        """Return the attack's own random stream."""
        return generator(self.seed, f"attack/{name}/{self.concept}")


class Attack(ABC):
    """A method to bring a concept back. `about` describes its settings."""

    name: ClassVar[str]
    unit: ClassVar[str]  # of its budget
    about: str

    def own_prompts(self, concept: str) -> list[str]:
        """Return prompts that replace the suite's; empty for most attacks."""
        return []

    @abstractmethod
    def attempts(self, victim: Victim, target: AttackTarget, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        """Yield the budget spent so far, and the embeddings of the attacked `prompts`, to be drawn with `victim` in its
        current state.

        The first attempt spends nothing, where that is possible. May change the victim's denoiser.
        """


def checkpoints(steps: int, count: int = 4) -> list[int]:
    """Return the steps at which images are drawn: the last one, and its halves."""
    return sorted({steps >> k for k in range(count) if steps >> k})
