"""Textual inversion (arXiv 2208.01618), which learns a new word for the concept (on erased models: arXiv 2308.01508)."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor

from esd_peft.attacks.attack import BATCH_SIZE, Attack, AttackTarget, checkpoints
from esd_peft.attacks.inversion import LEARNING_RATE, learn_words
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim
from esd_peft.models import PromptEmbeds


class TextualInversion(Attack):
    """One input embedding of the text encoder, from the concept's own on, by the denoising loss on images of it."""

    name: ClassVar[str] = "textual inversion"
    unit: ClassVar[str] = "steps"

    def __init__(self, steps: int = 300) -> None:
        self.steps = steps
        self.about = f"one learned token, {steps} steps of batch {BATCH_SIZE}, learning rate {LEARNING_RATE}"

    def attempts(self, victim: Victim, target: AttackTarget, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        draws = target.draws(self.name)
        word = f"<{target.concept.replace(' ', '-')}>"
        tokens = NewTokens(victim.encoders, [word])
        tokens.start_from(target.concept)

        def loss() -> Tensor:
            images = target.some(draws)
            embeds = victim.encode([target.captions[i].replace(target.concept, word) for i in images.tolist()])
            return victim.denoising_loss(embeds, target.latents[images], draws)

        yield 0, victim.encode_frozen(prompts)
        with tokens.known():
            for step, _ in zip(range(1, self.steps + 1), learn_words(tokens, loss), strict=False):
                if step in checkpoints(self.steps):
                    yield step, victim.encode_frozen([prompt.replace(target.concept, word) for prompt in prompts])
