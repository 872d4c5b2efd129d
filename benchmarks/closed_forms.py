"""Peers that edit keys and values of cross-attention in closed form, as their public code does it, for any diffusers UNet.

All of them move key vectors c (embeddings of tokens of the concept's prompts) to targets g (those of what it becomes), with
a ridge, and preserve retained vectors r.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from esd_peft.models import ModelFamily
from esd_peft.prompts.plan import mentions, retain_prompts

EXPANDED = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")  # UCE's, for objects


def uce(family: ModelFamily, concepts: list[str], form: str, expand: bool = False, retain: bool = False):
    """UCE (arXiv 2308.14761), for its concept type "object".

    `form` "current" (trainscripts/uce_sd_erase.py): the last word's token alone moves to the null prompt's. "old"
    (train-scripts/train_erase.py of 2023, technique "replace"): that token and all after it move to those of " ", and ""
    is always preserved. `expand` adds their five templates, `retain` our built-in retain set. λ is 0.5, as both set it.
    """
    retain_texts = _retained(concepts) if retain else []
    templates = ("{}", *(EXPANDED if expand else ()))
    pairs = [(t.format(c), t.format("") if form == "current" else " ") for c in concepts for t in templates]
    embed, last = _embedder(family, [*(text for pair in pairs for text in pair), *retain_texts, ""])
    if form == "current":
        target_keys = [embed[guide][last[guide]][None] for _, guide in pairs]
        concept_keys = [embed[named][last[named]][None] for named, _ in pairs]
        retained_keys, weight = [embed[text][last[text]][None] for text in retain_texts], 1.0
    else:
        target_keys, concept_keys = [], []
        for named, guide in pairs:
            count = len(embed[named]) - max(last[named], last[guide])
            target_keys.append(embed[guide][last[guide] :][:count])
            concept_keys.append(embed[named][last[named] :][:count])
        retained_keys, weight = [embed[text] for text in ["", *retain_texts]], max(0.1, 1 / (1 + len(retain_texts)))
    targets, keys = torch.cat(target_keys), torch.cat(concept_keys)
    retained = torch.cat(retained_keys) if retained_keys else keys[:0]
    regularizer = weight * retained.T @ retained + 0.5 * torch.eye(keys.shape[1], dtype=keys.dtype)
    matrix = (targets.T @ keys + regularizer) @ torch.linalg.inv(keys.T @ keys + regularizer)
    return _edited(family, lambda weight: weight @ matrix)


def speed(family: ModelFamily, concepts: list[str], augmented: int = 10, threshold: float = 0.1):
    """SPEED (arXiv 2503.07392, train_erase_null.py): values alone change, each layer's in the null space of retained keys.

    Of the built-in list those stay that an edit without null space moves more than the average one, and of `augmented`
    copies of each, with noise where the layer hears least, likewise. The null prompt's tokens (the first, and three means of
    the others) stay exactly. The null space is that of energies below `threshold`.
    """
    retain_texts = _retained(concepts)
    embed, last = _embedder(family, [*concepts, *retain_texts, ""])
    keys = torch.stack([embed[c][last[c]] for c in concepts])
    square, null = keys.T @ keys / len(keys), embed[""]
    moving = null[last[""]].outer(keys.mean(dim=0)) - square
    retained, eye = torch.stack([embed[text][last[text]] for text in retain_texts]), torch.eye(len(square), dtype=keys.dtype)
    exact = torch.cat([null[:1], _means(null[1:], 3)]).T
    draws = torch.Generator().manual_seed(0)

    def edit(weight: Tensor) -> Tensor:
        free = weight @ moving @ torch.linalg.inv(eye + square)
        chosen = _most_moved(retained, free)
        unheard = torch.linalg.svd(weight, full_matrices=False).Vh[-1]
        noise = torch.randn(augmented * len(chosen), 1, generator=draws, dtype=keys.dtype) * unheard
        chosen = torch.cat([chosen, _most_moved(chosen.repeat(augmented, 1) + noise, free)])
        energy, axes = torch.linalg.eigh(chosen.T @ chosen / len(chosen))
        null_space = axes[:, energy < threshold] @ axes[:, energy < threshold].T
        inverse = torch.linalg.inv(square @ null_space + eye)
        exactly = inverse @ exact @ torch.linalg.pinv(exact.T @ null_space @ inverse @ exact) @ exact.T @ null_space
        return weight + weight @ moving @ null_space @ (eye - exactly) @ inverse

    return _edited(family, edit, ("to_v",))


CLOSED_FORMS: dict[str, Callable] = {"uce": uce, "speed": speed}


def _retained(concepts: list[str]) -> list[str]:
    return [text for text in retain_prompts() if not any(mentions(concept, text) for concept in concepts)]


def _embedder(family: ModelFamily, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return each text's token embeddings `[tokens, width]` fp64, and the index of its last word's token."""
    texts = list(dict.fromkeys(texts))
    tokens = family.encode(texts, torch.device("cpu"), torch.float32)["encoder_hidden_states"].double()
    tokenizer = family.load_part("tokenizer")
    last = {text: len(tokenizer(text, truncation=True).input_ids) - 2 for text in texts}
    return dict(zip(texts, tokens, strict=True)), last


def _most_moved(keys: Tensor, change: Tensor) -> Tensor:
    """Return the prompts whose layer output changes more than average."""
    moved = (keys @ change.T).norm(dim=1)
    return keys[moved > moved.mean()]


def _means(points: Tensor, count: int) -> Tensor:
    """The means of `count` clusters (k-means, begun at evenly spread points)."""
    means = points[torch.linspace(0, len(points) - 1, count).long()]
    for _ in range(50):
        own = torch.cdist(points, means).argmin(dim=1)
        means = torch.stack([points[own == i].mean(dim=0) if (own == i).any() else means[i] for i in range(count)])
    return means


def _edited(family: ModelFamily, edit: Callable[[Tensor], Tensor], layers: tuple[str, ...] = ("to_k", "to_v")):
    """The denoiser with the weights of these layers of cross-attention edited, in fp64."""
    denoiser = family.load_denoiser(torch.float32)
    for name, module in denoiser.named_modules():
        if name.endswith(tuple(f"attn2.{layer}" for layer in layers)):
            module.weight.data = edit(module.weight.data.double()).float()
    return denoiser
