"""How a family reads prompts: what its tokenizers make of them, and its text encoders."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.models.offload import bring_encoders
from esd_peft.models.pipeline_directory import PipelineDirectory
from esd_peft.models.text_parts import control_tokens, own_tokens, plain_tokenizer, whole_words
from esd_peft.runtime.devices import is_accelerator, release

# What the denoiser is told about each prompt, under the names of its forward arguments: each [prompts, ...].
PromptEmbeds = dict[str, Tensor]
ENCODE_BATCH = 16  # prompts at a time


class PromptReader(PipelineDirectory, ABC):
    """The tokenizers and text encoders of a pipeline directory."""

    max_sequence_length: int | None = None  # tokens of a prompt, where the user says how many

    @abstractmethod
    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """What `pipe`, which has nothing but tokenizers and text encoders, makes of the prompts; of "" its null prompt."""

    def templated(self, tokenizer: Any, text: str) -> str:
        """What the text encoder is told of a prompt: of a language model its chat template belongs to it."""
        return text

    @property
    def reads_long_prompts(self) -> bool:
        """Whether there is a T5 or a language model, whose `prompt_length` can be told."""
        return self.prompt_length > 0

    @final
    def load_encoders(self, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline's tokenizers and text encoders for `encode_many`; of large encoders layers come as they compute."""
        pipe = self.assemble(self.text_parts, dtype)
        if is_accelerator(device):
            bring_encoders(pipe, device)
        else:
            pipe.to(device)
        return pipe

    @final
    def encode_many(
        self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device, home: torch.device
    ) -> PromptEmbeds:
        """`encode_prompts`, some of however many prompts at a time; what it makes of them goes `home`."""
        batches = (prompts[i : i + ENCODE_BATCH] for i in range(0, len(prompts), ENCODE_BATCH))
        parts = [{k: v.to(home) for k, v in self.encode_prompts(pipe, batch, device).items()} for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @final
    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Text encoders in, embeddings out, text encoders freed. The null prompt is "".

        Of a large encoder one layer at a time is on a GPU: the same embeddings, in little memory. The pipeline itself
        encodes: padding, masks and layers are its own.
        """
        pipe = self.load_encoders(device, dtype)
        embeds = self.encode_many(pipe, prompts, device, torch.device("cpu"))
        del pipe
        release(device)
        return {name: value.to(device) for name, value in embeds.items()}

    @final
    def check_lengths(self, texts: dict[str, list[str]]) -> None:
        """Raise `UserError` for a text, of those that options gave, of which the encoder reads the beginning only."""
        for option, given in texts.items():
            for text, (count, most) in zip(given, self.token_counts(given), strict=True):
                if count > most:
                    fix = "use fewer words" + (", or raise --max-sequence-length" if self.max_sequence_length else "")
                    raise UserError(
                        f"{option} {text!r} is {count} tokens long and the text encoder reads {most}, so the rest would be "
                        f"left out; {fix}"
                    )

    @final
    def check_seen(self, texts: dict[str, list[str]]) -> None:
        """Raise `UserError` for a text, of those that options gave, of which no tokenizer sees a word, or that spells out a
        token with which one of them ends or begins prompts."""
        parts = [part for part in self.text_parts if "tokenizer" in part and self.has(part)]
        tokenizers = [plain_tokenizer(self.load_part(part)) for part in parts]
        for option, given in texts.items():
            for text in given:
                if spelled := [token for tokenizer in tokenizers for token in control_tokens(tokenizer, text)]:
                    raise UserError(f"{option} {text!r} has the tokenizer's own {spelled[0]} in it; leave that out")
                if not any(own_tokens(tokenizer, text) for tokenizer in tokenizers):
                    raise UserError(f"{option} {text!r}: no tokenizer of this model has tokens for it; reword it")

    @final
    def read_whole(self, texts: Iterable[str]) -> list[str]:
        """Those texts that the text encoder reads to the end: small ones know few words as a whole."""
        texts = [*texts]
        return [text for text, (count, most) in zip(texts, self.token_counts(texts), strict=True) if count <= most]

    @final
    def token_counts(self, texts: list[str]) -> list[tuple[int, int]]:
        """Of each text how many tokens it has, with its template's, and how many the text encoder reads; of several encoders
        the last one, which reads the most."""
        tokenizer = self._reader
        own = tokenizer.model_max_length if "CLIP" in type(tokenizer).__name__ else self.prompt_length
        most = own or tokenizer.model_max_length
        told = [(self.templated(tokenizer, text), text) for text in texts]  # templates have special tokens of their own
        options = {"truncation": False, "verbose": False}
        ids = [tokenizer(said, add_special_tokens=said == text, **options).input_ids for said, text in told]
        return [(len(each), most) for each in ids]

    @final
    @functools.cached_property
    def template_length(self) -> int:
        """How many of the `token_counts` are the template's."""
        told = self.templated(self._reader, "")
        return len(self._reader(told, add_special_tokens=False).input_ids) if told else 0

    @final
    @functools.cached_property
    def _reader(self) -> Any:
        """The last tokenizer; loading it takes longer than most that it is asked."""
        parts = [part for part in self.text_parts if "tokenizer" in part and self.has(part)]
        tokenizer = plain_tokenizer(self.load_part(parts[-1]))
        self._fit_length(tokenizer, parts[-1])
        return tokenizer

    @final
    @property
    def prompt_length(self) -> int:
        """How many tokens of a prompt T5 or a language model reads; 0 where there is none."""
        own = inspect.signature(self.pipeline_class.__call__).parameters.get("max_sequence_length")
        return 0 if own is None else self.max_sequence_length or int(own.default)

    @final
    def whole_words(self) -> list[str]:
        """The words that are one token of the vocabulary, in its order: of three letters or more, from a to z."""
        return whole_words(plain_tokenizer(self.load_part("tokenizer")).get_vocab())

    @final
    def unseen_words(self, prompt: str) -> list[str]:
        """Words that the tokenizer has no token for as a whole."""
        tokenizer = self.load_part("tokenizer")
        return [word for word in prompt.split() if len(tokenizer.tokenize(word)) != 1]
