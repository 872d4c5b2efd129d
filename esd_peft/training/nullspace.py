"""Where an adapter may act without touching what is to stay.

A layer that reads the prompt computes W x for token embeddings x. A change ΔW with ΔW P = ΔW, P the projection that
removes the directions of preserved embeddings, leaves W x as it is for every x in their span. SuPLoRA (many concepts
in diffusion models) and AlphaEdit (facts in language models) build on the same idea.
"""

import torch
from torch import Tensor


def null_space_projection(embeddings: Tensor, energy: float) -> Tensor:
    """The projection `[width, width]` fp32 that removes the leading directions of `embeddings` `[n, width]`.

    As many principal directions (uncentred, largest first) are removed as hold the share `energy` of the sum of squares.
    """
    values, directions = torch.linalg.eigh(gram(embeddings, embeddings))
    shares = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    count = min(int((shares < energy).sum()) + 1, len(values) - 1)
    removed = directions.flip(1)[:, :count]
    return (torch.eye(len(values), dtype=torch.float64, device=embeddings.device) - removed @ removed.T).float()


def gram(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right in fp64, of which only a part is held at a time: prompts to preserve may be many."""
    parts = zip(left.split(4096), right.split(4096), strict=True)
    return sum((a.double().T @ b.double() for a, b in parts), left.new_zeros((), dtype=torch.float64))
