"""Prompts whose tokens differ in number: padded to one length they lie in a table, and the denoiser reads them without."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from esd_peft.models.family import MASK, TOKENS, PromptEmbeds


def encode_tokens(
    pipe: DiffusionPipeline, texts: list[str], device: torch.device, layer: int, padding: str, length: int, template: int = 0
) -> PromptEmbeds:
    """The text encoder's hidden states after `layer`, `[texts, length, width]`, and which of them are tokens.

    The tokenizer's `padding` is the pipeline's; what it padded is left out, as are the first tokens, which are the
    `template`'s, and zeros follow to the common `length`. On the meta device the mask is on the CPU: lengths are values.
    """
    tokens = pipe.tokenizer(texts, padding=padding, truncation=True, max_length=length + template, return_tensors="pt")
    states = pipe.text_encoder(
        input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device), output_hidden_states=True
    ).hidden_states[layer]
    places = [mask.nonzero().squeeze(1)[template:] for mask in tokens.attention_mask]
    rows = [state[place.to(device)] for state, place in zip(states, places, strict=True)]
    padded = [nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows]
    masks = [(torch.arange(length) < len(row)).long() for row in rows]
    mask = torch.stack(masks)
    return {TOKENS: torch.stack(padded), MASK: mask if device.type == "meta" else mask.to(device)}


def token_lists(embeds: PromptEmbeds) -> list[Tensor]:
    """The tokens of each prompt, `[tokens, width]`, without padding."""
    return [tokens[:length] for tokens, length in zip(embeds[TOKENS], _lengths(embeds), strict=True)]


def shortened(embeds: PromptEmbeds) -> PromptEmbeds:
    """The embeddings without the padding that is behind all of them."""
    longest = max(_lengths(embeds), default=0)
    return {name: value[:, :longest] for name, value in embeds.items()}


def _lengths(embeds: PromptEmbeds) -> list[int]:
    """Return the number of tokens of each prompt.

    For it the host waits for the device, once a prediction: numbers of tokens decide on shapes. These denoisers have
    billions of parameters, beside which that is little.
    """
    lengths: list[int] = embeds[MASK].sum(dim=1).tolist()
    return lengths
