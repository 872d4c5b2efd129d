"""Text encoders, loaded once a run: whatever prompts a run needs are encoded here, before the denoiser is loaded."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from types import TracebackType

import torch
from diffusers import DiffusionPipeline

from esd_peft.models.family import ModelFamily, PromptEmbeds
from esd_peft.runtime.devices import release

MANY, SOME = 256, 64  # of prompts that are cut short are encoded at a time, by CLIP and by others
PROMPT = "prompt "
WHOLE = 0  # the length of a prompt that is not cut


def prompt_call(length: int) -> str:
    """Return what encoding a prompt of which `length` tokens are read counts as (`esd_peft.erasure.flops`)."""
    return f"{PROMPT}{length}"


class TextEncoder:
    """A pipeline's tokenizers and text encoders on `device`, within the block; afterwards their memory is free again.

    Of a large encoder one layer at a time is on a GPU: the same embeddings, in little memory.
    """

    def __init__(self, family: ModelFamily, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.device, self.dtype = family, device, dtype
        self.calls: Counter[str] = Counter()  # prompts so far, by the name that `prompt_call` gives their length
        self.pipe = family.load_encoders(device, dtype)

    def __enter__(self) -> "TextEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.pipe
        release(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings `[prompts, ...]` in host memory. The null prompt is ""."""
        self.calls[prompt_call(WHOLE)] += len(prompts)
        return self.family.encode_many(self.pipe, prompts, self.device, torch.device("cpu"))

    @torch.no_grad()
    def encode_short(self, prompts: list[str], length: int) -> Iterator[PromptEmbeds]:
        """Yield embeddings on the device of the first `length` tokens, some prompts at a time."""
        self.calls[prompt_call(length)] += len(prompts)
        size = SOME if self.family.prompt_length else MANY
        with shortened(self.family, self.pipe, length):
            for i in range(0, len(prompts), size):
                yield self.family.encode_prompts(self.pipe, prompts[i : i + size], self.device)


@contextlib.contextmanager
def shortened(family: ModelFamily, pipe: DiffusionPipeline, length: int) -> Iterator[None]:
    """Shorten prompts to `length` tokens for `pipe` inside the block; `WHOLE` leaves them whole."""
    if length == WHOLE:
        yield
        return
    own, of_clip = family.max_sequence_length, getattr(pipe, "tokenizer_max_length", None)
    tokenizers = [part for name, part in pipe.components.items() if "tokenizer" in name and part is not None]
    lengths = [tokenizer.model_max_length for tokenizer in tokenizers]
    try:
        if family.prompt_length:
            family.max_sequence_length = min(length, family.prompt_length)
        if of_clip is not None:
            pipe.tokenizer_max_length = min(length, of_clip)
        for tokenizer in tokenizers:
            tokenizer.model_max_length = min(length, tokenizer.model_max_length)
        yield
    finally:
        family.max_sequence_length = own
        if of_clip is not None:
            pipe.tokenizer_max_length = of_clip
        for tokenizer, full in zip(tokenizers, lengths, strict=True):
            tokenizer.model_max_length = full
