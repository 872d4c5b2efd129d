"""Peers that edit keys and values of cross-attention in closed form, as their public code does it, for any diffusers UNet.

All of them move key vectors c (embeddings of tokens of the concept's prompts) to targets g (those of what it becomes), with
a ridge, and hold retained vectors r where they are. As each weight W becomes W M with the same M, this is solved once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from esd_peft.models import ModelFamily
from esd_peft.prompts.plan import names, retain_prompts

EXPANDED = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")  # UCE's, for objects


def uce(family: ModelFamily, concepts: list[str], form: str, expand: bool = False, retain: bool = False):
    """UCE (arXiv 2308.14761), for its concept type "object".

    `form` "current" (trainscripts/uce_sd_erase.py): the last word's token alone moves to the null prompt's, λ 0.5. "old"
    (train-scripts/train_erase.py of 2023, technique "replace"): that token and all after it, λ 0.1. `expand` adds their
    five templates, `retain` holds our built-in list.
    """
    kept = _retained(concepts) if retain else []
    pairs = [
        (template.format(c), template.format("")) for c in concepts for template in ("{}", *(EXPANDED if expand else ()))
    ]
    embed, last = _embedder(family, [*(text for pair in pairs for text in pair), *kept, "", " "])
    left, right = [], []
    for named, guide in pairs:
        guide = guide or ("" if form == "current" else " ")
        if form == "current":
            left.append(embed[guide][last[guide]][None])
            right.append(embed[named][last[named]][None])
        else:
            farthest = max(last[named], last[guide])
            count = len(embed[named]) - farthest
            left.append(embed[guide][last[guide] : last[guide] + count])
            right.append(embed[named][last[named] : last[named] + count])
    if form == "current":
        held, ridge, weight = [embed[text][last[text]][None] for text in kept], 0.5, 1.0
    else:
        held, ridge, weight = [embed[text] for text in kept or [""]], 0.1, max(0.1, 1 / max(1, len(kept)))
    targets, keys = torch.cat(left), torch.cat(right)
    retained = torch.cat(held) if held else keys[:0]
    hold = weight * retained.T @ retained + ridge * torch.eye(keys.shape[1], dtype=keys.dtype)
    return _edited(family, (targets.T @ keys + hold) @ torch.linalg.inv(keys.T @ keys + hold))


def speed(family: ModelFamily, concepts: list[str], explained: float = 0.999):
    """After SPEED (arXiv 2503.07392): the edit acts in the null space of retained embeddings, of which only those stay in
    the set that an edit without it moves more than the average one."""
    kept = _retained(concepts)
    embed, last = _embedder(family, [*concepts, *kept, "", " "])
    keys = torch.cat([embed[c][last[c] :] for c in concepts])
    targets = torch.cat([embed[""][last[c] :] for c in concepts])
    eye = torch.eye(keys.shape[1], dtype=keys.dtype)
    free = (targets - keys).T @ keys @ torch.linalg.inv(keys.T @ keys + 0.1 * eye)
    moved = torch.stack([(embed[text][1:] @ free.T).norm(dim=1).max() for text in kept])
    chosen = torch.cat([embed[text] for text, much in zip(kept, moved >= moved.mean(), strict=True) if much] + [embed[""]])
    energy, axes = torch.linalg.eigh(chosen.T @ chosen)
    share = energy.flip(0).cumsum(0) / energy.sum()
    held = axes.flip(1)[:, : int((share < explained).sum()) + 1]
    null = eye - held @ held.T
    inside = keys @ null
    change = (targets - keys).T @ inside @ torch.linalg.inv(inside.T @ inside + 0.1 * eye) @ null
    return _edited(family, eye + change)


CLOSED_FORMS: dict[str, Callable] = {"uce": uce, "speed": speed}


def _retained(concepts: list[str]) -> list[str]:
    return [text for text in retain_prompts() if not any(names(concept, text) for concept in concepts)]


def _embedder(family: ModelFamily, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Of each text its token embeddings `[tokens, width]` fp64, and the place of its last word's token."""
    texts = list(dict.fromkeys(texts))
    tokens = family.encode(texts, torch.device("cpu"), torch.float32)["encoder_hidden_states"].double()
    tokenizer = family.load_part("tokenizer")
    last = {text: len(tokenizer(text, truncation=True).input_ids) - 2 for text in texts}
    return dict(zip(texts, tokens, strict=True)), last


def _edited(family: ModelFamily, matrix: Tensor):
    """The denoiser with all keys and values of cross-attention edited."""
    denoiser = family.load_denoiser(torch.float32)
    for name, module in denoiser.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.data = (module.weight.data.double() @ matrix).float()
    return denoiser
