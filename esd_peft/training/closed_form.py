"""A change of the layers that read the prompt, solved for rather than learned.

Keys and values are linear in the prompt's token embeddings x. What turns a prompt that names the concept into what is
to stand there, token by token, is the D that minimises

    Σ_concept ‖x + D x − x_target‖² + Σ_held ‖D x‖² + λ ‖D‖²,   D = D P

with P the projection of `esd_peft.training.nullspace`; a layer W becomes W + W D. Layers are not run for it, let alone the
denoiser. UCE (arXiv 2308.14761) edits the same layers in closed form; here it is where training starts from.
"""

import torch
from torch import Tensor

from esd_peft.training.nullspace import gram

RIDGE = 1e-3  # λ as a share of the largest eigenvalue
SMALL = 512  # the shorter side of a layer, up to which a full decomposition takes no time
OVERSAMPLING, ITERATIONS = 8, 4


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
    left, sizes, right = _leading(change, rank)
    root = torch.zeros(rank, device=change.device)
    root[: len(sizes)] = sizes[:rank].sqrt()
    up, down = change.new_zeros(change.shape[0], rank), change.new_zeros(rank, change.shape[1])
    up[:, : len(sizes)], down[: len(sizes)] = left[:, :rank], right[:rank]
    return up * root, root[:, None] * down


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ, of which the first `rank` count; of a large matrix no more than are needed.

    There the randomised decomposition (arXiv 0909.4061) comes within a thousandth of the best approximation in a thirtieth
    of the time: SDXL has 140 such layers, each of which a full one would take two seconds of a CPU.
    """
    if min(matrix.shape) <= SMALL:
        return torch.linalg.svd(matrix, full_matrices=False)
    with torch.random.fork_rng([matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, *matrix.shape), niter=ITERATIONS)
    return left, sizes, right.T
