"""Fine-tuning recovery: how few steps of ordinary training on images of the concept bring it back."""

from collections.abc import Iterator
from typing import ClassVar

import torch

from esd_peft.attacks.attack import BATCH_SIZE, Attack, AttackTarget, checkpoints
from esd_peft.attacks.victim import Victim
from esd_peft.models import PromptEmbeds
from esd_peft.models.family import index_embeds

LEARNING_RATE = 1e-4


class FineTuning(Attack):
    """Trains the whole denoiser with the denoising loss on images of the concept, under its own name."""

    name: ClassVar[str] = "fine-tuning"
    unit: ClassVar[str] = "steps"

    def __init__(self, steps: int = 64) -> None:
        self.steps = steps
        self.about = f"the whole denoiser, AdamW, {steps} steps of batch {BATCH_SIZE}, learning rate {LEARNING_RATE}"

    def attempts(self, victim: Victim, target: AttackTarget, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        draws = target.draws(self.name)
        embeds, captions = victim.encode_frozen(prompts), victim.encode_frozen(target.captions)
        yield 0, embeds
        learned = [*victim.denoiser.requires_grad_(True).parameters()]
        optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE)
        for step in range(1, self.steps + 1):
            images = target.some(draws)
            named = index_embeds(captions, images.to(victim.device))
            victim.denoising_loss(named, target.latents[images], draws).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in checkpoints(self.steps):
                yield step, embeds
