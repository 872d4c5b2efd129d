"""A change of the layers that read the prompt, solved for rather than learned.

Keys and values are linear in the prompt's token embeddings x. What turns a prompt that names the concept into what is
to stand there, token by token, is the D that minimises

    Σ_concept ‖x + D x − x_target‖² + Σ_held ‖D x‖² + λ ‖D‖²,   D = D P

with P the projection of `esd_peft.nullspace`; a layer W becomes W + W D. Layers are not run for it, let alone the
denoiser. UCE (arXiv 2308.14761) edits the same layers in closed form; here it is where training starts from.
"""

import torch
from torch import Tensor

from esd_peft.nullspace import gram

RIDGE = 1e-3  # λ as a share of the largest eigenvalue


def solve(concept: Tensor, target: Tensor, held: Tensor, projection: Tensor | None) -> Tensor:
    """D `[width, width]` fp32 for token embeddings `[n, width]` of the concept, of what is to stand there in the same
    order, and `[m, width]` of what is to stay; without a projection P is the identity."""
    wide = torch.eye(concept.shape[1], dtype=torch.float64, device=concept.device)
    free = wide if projection is None else projection.double()
    seen = free @ (gram(concept, concept) + gram(held, held)) @ free
    ridge = RIDGE * torch.linalg.eigvalsh(seen)[-1]
    wanted = gram(target - concept, concept) @ free
    return (wanted @ torch.linalg.inv(seen + ridge * wide) @ free).float()


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B `[out, rank]` and A `[rank, in]` for a layer's `change` ≈ B A, both of the same size."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    root = torch.zeros(rank, device=change.device)
    root[: len(sizes)] = sizes[:rank].sqrt()
    up, down = change.new_zeros(change.shape[0], rank), change.new_zeros(rank, change.shape[1])
    up[:, : len(sizes)], down[: len(sizes)] = left[:, :rank], right[:rank]
    return up * root, root[:, None] * down
