"""A family's tokenizers and text encoders, and the prompt embeddings that they produce."""

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
from esd_peft.models.text_parts import control_tokens, plain_tokenizer, whole_words, word_tokens
from esd_peft.runtime.devices import is_accelerator, release

# The denoiser's inputs of each prompt, by the names of its forward arguments: each [prompts, ...].
PromptEmbeds = dict[str, Tensor]
ENCODE_BATCH = 16  # prompts at a time


class PromptReader(PipelineDirectory, ABC):
    """The tokenizers and text encoders of a pipeline directory."""

    max_sequence_length: int | None = None  # tokens of a prompt, if the user sets it

    @abstractmethod
    def encode_prompts(self, pipe: DiffusionPipeline, prompts: list[str], device: torch.device) -> PromptEmbeds:
        """Encode prompts with `pipe`, which has only tokenizers and text encoders; "" is the null prompt."""

    def templated(self, tokenizer: Any, text: str) -> str:
        """Return the text that the text encoder gets for a prompt; language models add their chat template."""
        return text

    @property
    def reads_long_prompts(self) -> bool:
        """True if there is a T5 or language model, whose `prompt_length` can be set."""
        return self.prompt_length > 0

    @final
    def load_encoders(self, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """Load tokenizers and text encoders for `encode_many`; large encoders move to the device layer by layer as they
        compute.
        """
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
        """Encode any number of prompts in batches, and move the embeddings to `home`."""
        batches = (prompts[i : i + ENCODE_BATCH] for i in range(0, len(prompts), ENCODE_BATCH))
        parts = [{k: v.to(home) for k, v in self.encode_prompts(pipe, batch, device).items()} for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @final
    @torch.no_grad()
    def encode(self, prompts: list[str], device: torch.device, dtype: torch.dtype) -> PromptEmbeds:
        """Load the text encoders, encode the prompts, and free the encoders. The null prompt is "".

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
        """Raise `UserError` for an option's text that the text encoder would truncate."""
        for option, option_texts in texts.items():
            for text, (count, most) in zip(option_texts, self.token_counts(option_texts), strict=True):
                if count > most:
                    fix = "use fewer words" + (", or raise --max-sequence-length" if self.max_sequence_length else "")
                    raise UserError(
                        f"{option} {text!r} is {count} tokens long and the text encoder reads {most}, so the rest would be "
                        f"left out; {fix}"
                    )

    @final
    def check_seen(self, texts: dict[str, list[str]]) -> None:
        """Raise `UserError` for an option's text without a known token, or with a control token of a tokenizer."""
        parts = [part for part in self.text_parts if "tokenizer" in part and self.has(part)]
        tokenizers = [plain_tokenizer(self.load_part(part)) for part in parts]
        for option, option_texts in texts.items():
            for text in option_texts:
                if spelled := [token for tokenizer in tokenizers for token in control_tokens(tokenizer, text)]:
                    raise UserError(f"{option} {text!r} has the tokenizer's own {spelled[0]} in it; leave that out")
                if not any(word_tokens(tokenizer, text) for tokenizer in tokenizers):
                    raise UserError(f"{option} {text!r}: no tokenizer of this model has tokens for it; reword it")

    @final
    def read_whole(self, texts: Iterable[str]) -> list[str]:
        """Return the texts that the text encoder does not truncate."""
        texts = [*texts]
        return [text for text, (count, most) in zip(texts, self.token_counts(texts), strict=True) if count <= most]

    @final
    def token_counts(self, texts: list[str]) -> list[tuple[int, int]]:
        """Return for each text its number of tokens, with the template's, and the number that the text encoder reads.

        Of several encoders the last one counts, which reads the most.
        """
        tokenizer = self._reader
        own = tokenizer.model_max_length if "CLIP" in type(tokenizer).__name__ else self.prompt_length
        most = own or tokenizer.model_max_length
        templated = [(self.templated(tokenizer, text), text) for text in texts]  # templates have special tokens of their own
        options = {"truncation": False, "verbose": False}
        ids = [
            tokenizer(full_text, add_special_tokens=full_text == text, **options).input_ids for full_text, text in templated
        ]
        return [(len(each), most) for each in ids]

    @final
    @functools.cached_property
    def template_length(self) -> int:
        """The number of tokens of the chat template, included in `token_counts`."""
        template = self.templated(self._reader, "")
        return len(self._reader(template, add_special_tokens=False).input_ids) if template else 0

    @final
    @functools.cached_property
    def _reader(self) -> Any:
        """The last tokenizer, cached, since loading it is slow."""
        parts = [part for part in self.text_parts if "tokenizer" in part and self.has(part)]
        tokenizer = plain_tokenizer(self.load_part(parts[-1]))
        self._fit_length(tokenizer, parts[-1])
        return tokenizer

    @final
    @property
    def prompt_length(self) -> int:
        """The number of prompt tokens that T5 or a language model reads; 0 without one."""
        own = inspect.signature(self.pipeline_class.__call__).parameters.get("max_sequence_length")
        return 0 if own is None else self.max_sequence_length or int(own.default)

    @final
    def whole_words(self) -> list[str]:
        """Return the words of the vocabulary that are one token, in its order: three letters or more, a to z."""
        return whole_words(plain_tokenizer(self.load_part("tokenizer")).get_vocab())

    @final
    def unseen_words(self, prompt: str) -> list[str]:
        """Return the words that are not one token of the tokenizer."""
        tokenizer = self.load_part("tokenizer")
        return [word for word in prompt.split() if len(tokenizer.tokenize(word)) != 1]
