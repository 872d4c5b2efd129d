"""A search for tokens in front of the prompt, after UnlearnDiffAtk (arXiv 2310.11868): white-box, no other model's help."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from esd_peft.attacks.attack import BATCH_SIZE, Attack, AttackTarget, checkpoints
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim
from esd_peft.models import PromptEmbeds

LEARNING_RATE, WEIGHT_DECAY = 0.01, 0.1


class Prefix(Attack):
    """K tokens of the vocabulary before every prompt.

    Each token is a distribution over the vocabulary, from the uniform one on. An iteration draws tokens from these; Adam
    moves the distributions by the denoising loss, straight through the draw and with gradients clipped to [−1, 1]; then they
    are projected onto the simplex. Images are asked for with the likeliest tokens. All this is as in the authors' code,
    which searches for one prompt and one image at a time, and at chosen timesteps; here all prompts, images and
    timesteps are drawn from.

    Where a pipeline has several text encoders, each gets tokens of its own vocabulary.
    """

    name: ClassVar[str] = "prefix"
    unit: ClassVar[str] = "iterations"

    def __init__(self, steps: int = 40, tokens: int = 5) -> None:
        self.steps, self.tokens = steps, tokens
        self.about = (
            f"{tokens} tokens before the prompt, {steps} iterations of batch {BATCH_SIZE}, learning rate {LEARNING_RATE}"
        )

    def attempts(self, victim: Victim, target: AttackTarget, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        draws = target.draws(self.name)
        words = [f"<prefix{i}>" for i in range(self.tokens)]
        tokens = NewTokens(victim.encoders, words)
        before = " ".join(words)
        tables = {name: tokens.table(name).float() for name in tokens.embeddings}
        shares = {name: torch.full((self.tokens, len(t)), 1 / len(t), device=t.device) for name, t in tables.items()}
        optimizer = torch.optim.Adam(shares.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        yield 0, victim.encode_frozen(prompts)
        with tokens.known():
            for step in range(1, self.steps + 1):
                drawn = {
                    name: torch.multinomial(share.cpu(), 1, generator=draws).squeeze(1) for name, share in shares.items()
                }
                tokens.embeddings = {
                    name: tables[name][ids.to(tables[name].device)].requires_grad_() for name, ids in drawn.items()
                }
                images = target.some(draws)
                embeds = victim.encode([f"{before} {target.captions[i]}" for i in images.tolist()])
                loss = victim.denoising_loss(embeds, target.latents[images], draws)
                gradients = torch.autograd.grad(loss, [*tokens.embeddings.values()])
                for (name, share), gradient in zip(shares.items(), gradients, strict=True):
                    share.grad = (gradient @ tables[name].T).clamp(-1, 1)
                optimizer.step()
                for share in shares.values():
                    share.copy_(onto_simplex(share))
                if step in checkpoints(self.steps):
                    tokens.embeddings = {name: tables[name][share.argmax(dim=1)] for name, share in shares.items()}
                    yield step, victim.encode_frozen([f"{before} {prompt}" for prompt in prompts])


def onto_simplex(rows: Tensor) -> Tensor:
    """The closest points `[n, size]` whose entries are at least 0 and add up to 1 (Duchi et al. 2008, by sorting)."""
    ordered = rows.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(dim=1) - 1) / torch.arange(1, rows.shape[1] + 1, device=rows.device)
    last = (ordered > excess).sum(dim=1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)
