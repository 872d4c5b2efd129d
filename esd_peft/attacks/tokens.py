"""Words that no tokenizer knows: their embeddings are given by whoever attacks, and learned."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from esd_peft.models.text_parts import plain_tokenizer


class NewTokens:
    """New words in every tokenizer of a pipeline, and for each text encoder their input embeddings.

    Hooks around the encoders' input embeddings insert them, so this works for every family: the result of `encode_prompts`
    for prompts with `words` has gradients for `embeddings`. The text encoders get the id 0 in their place, since CLIP takes
    the largest id as the end of the prompt.

    Args:
        pipe: with tokenizers and text encoders; its tokenizers are extended in place.
        words: one or more, none of which a tokenizer knows.
    """

    def __init__(self, pipe: DiffusionPipeline, words: list[str]) -> None:
        self.pipe, self.words = pipe, words
        self.embeddings: dict[str, Tensor] = {}  # by encoder: [words, width] fp32
        self._parts: list[tuple[str, Any, int]] = []
        for name, encoder in pipe.components.items():
            if isinstance(encoder, nn.Module):
                tokenizer = plain_tokenizer(pipe.components[name.replace("text_encoder", "tokenizer")])
                tokenizer.add_tokens(words)
                start = self.table(name).detach().float().mean(0).repeat(len(words), 1)
                self.embeddings[name] = nn.Parameter(start)
                self._parts.append((name, encoder, tokenizer.convert_tokens_to_ids(words[0])))

    def table(self, name: str) -> Tensor:
        """The input embeddings `[vocabulary, width]` that an encoder comes with."""
        return self.pipe.components[name].get_input_embeddings().weight

    @torch.no_grad()
    def start_from(self, text: str, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Initialise every new token as the mean embedding of the words in `text`; token i adds i times `noise`, in units of
        the embeddings' standard deviation.
        """
        for name, encoder, _ in self._parts:
            tokenizer = plain_tokenizer(self.pipe.components[name.replace("text_encoder", "tokenizer")])
            ids = tokenizer(text, add_special_tokens=False).input_ids
            table = encoder.get_input_embeddings().weight
            value = self.embeddings[name]
            draws = torch.randn(value.shape, generator=generator).to(value.device)
            sizes = noise * torch.arange(len(value), device=value.device).unsqueeze(1) * table.float().std()
            value.copy_(table[torch.tensor(ids, device=table.device)].float().mean(0) + sizes * draws)

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """Register hooks inside the block with which the text encoders read the words."""
        handles = [handle for part in self._parts for handle in self._hook(*part)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, encoder: Any, first: int) -> list[Any]:
        places: list[Tensor] = []

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids = args[0] if args else kwargs["input_ids"]
            places[:] = [ids - first]
            plain = ids.masked_fill((ids >= first) & (ids < first + len(self.words)), 0)
            return ((plain, *args[1:]), kwargs) if args else (args, kwargs | {"input_ids": plain})

        def put(_: nn.Module, __: tuple[Any, ...], rows: Tensor) -> Tensor:
            last = len(self.words) - 1
            new = (places[0] >= 0) & (places[0] <= last)
            mine = self.embeddings[name].to(rows.dtype)[places[0].clamp(0, last)]
            return torch.where(new.unsqueeze(-1), mine, rows)

        table = encoder.get_input_embeddings().weight  # some encoders hold it in two places
        inputs = [m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is table]
        hooks = [encoder.register_forward_pre_hook(read, with_kwargs=True)]
        return [*hooks, *(module.register_forward_hook(put) for module in inputs)]
