"""Learning the input embeddings of new words (textual inversion, arXiv 2208.01618)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from esd_peft.attacks.tokens import NewTokens

LEARNING_RATE = 0.02


def learn_words(tokens: NewTokens, loss: Callable[[], Tensor]) -> Iterator[float]:
    """An Adam step on the embeddings each time it is asked; yields the `loss`, which reads prompts with the words in them.

    Nothing else gets a gradient, whatever else learns in the model.
    """
    learned = [*tokens.embeddings.values()]
    optimizer = torch.optim.Adam(learned, lr=LEARNING_RATE)
    while True:
        value = loss()
        for embedding, gradient in zip(learned, torch.autograd.grad(value, learned), strict=True):
            embedding.grad = gradient
        optimizer.step()
        yield value.item()
