"""Linear maps of the prompt embeddings, for the layers that read them: where they may not act, and where they start.

Keys and values compute W x for the prompt's token embeddings x.

- The null space: a change ΔW with ΔW P = ΔW, P the projection that removes the leading directions of the retain set's
  embeddings, leaves W x as it is for every x in their span. SuPLoRA (many concepts in diffusion models) and AlphaEdit (facts
  in language models) build on the same idea.
- The closed form: what turns a prompt that names the concept into what is to stand there, token by token, is the D that
  minimises

      Σ_concept ‖x + D x − x_target‖² + Σ_retain ‖D x‖² + λ ‖D‖²,   D = D P

  and a layer W becomes W + W D. Layers are not run for it, let alone the denoiser. UCE (arXiv 2308.14761) edits the same
  layers in closed form; here it is where training starts from.
"""

import torch
from diffusers import ModelMixin
from torch import Tensor

from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.family import MASK
from esd_peft.options.training import StudentOptions
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime.devices import exact, is_accelerator

PromptMaps = dict[str, Tensor]  # for each kind of prompt embeddings that a layer reads, a map [width, width] fp32
EXPLAINED = 0.999  # of the retain set's variance, by the subspace in which nothing is learned
NEAR = 0.99  # where a concept is erased from one thing only: the retain set has words of it
RIDGE = 1e-3  # λ as a share of the largest eigenvalue
SMALL = 512  # the shorter side of a layer, up to which a full decomposition takes no time
OVERSAMPLING, ITERATIONS = 8, 4


@torch.no_grad()
def prompt_maps(
    options: StudentOptions, plan: PromptPlan, family: ModelFamily, denoiser: ModelMixin, embeds: PromptEmbeds
) -> tuple[PromptMaps, PromptMaps]:
    """The projections of the null space and the changes of the closed form, for the layers in `options.scope`.

    Both are empty where the options do without them, or where none of the layers reads the prompt and nothing else.
    `embeds` are those of `plan.texts`, on the denoiser's device.
    """
    layers = family.scope_modules(denoiser, options.scope)
    row = {text: i for i, text in enumerate(plan.texts)}
    projections: PromptMaps = {}
    changes: PromptMaps = {}
    for kind in sorted({kind for layer in layers if (kind := family.prompt_input(layer)) is not None}):
        rows = family.prompt_rows(denoiser, embeds, kind)  # [texts, tokens, width]
        counts = embeds[MASK].bool() if MASK in embeds else rows.new_ones(rows.shape[:2], dtype=torch.bool)

        def tokens(prompts: list[str], rows: Tensor = rows, counts: Tensor = counts) -> Tensor:
            index = torch.tensor([row[prompt] for prompt in prompts], device=rows.device)
            return rows[index][counts[index]]

        if options.closed_form:
            projections[kind] = null_space_projection(tokens(plan.retain), NEAR if plan.sources else EXPLAINED)
            pairs = torch.tensor([(row[p.prompt], row[p.anchor_prompt]) for p in plan.all_concept_pairs], device=rows.device)
            concept, target = _token_by_token(rows, counts, *pairs.T)
            changes[kind] = solve(concept, target, tokens(plan.preserved_texts), projections[kind])
    return projections, changes


def null_space_projection(embeddings: Tensor, explained_variance: float) -> Tensor:
    """The projection `[width, width]` fp32 that removes the leading directions of `embeddings` `[n, width]`.

    As many principal directions (uncentred, largest first) are removed as explain that share of the sum of squares.
    """
    values, directions = torch.linalg.eigh(gram(embeddings, embeddings))
    shares = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    count = min(int((shares < explained_variance).sum()) + 1, len(values) - 1)
    removed = directions.flip(1)[:, :count]
    return (torch.eye(len(values), dtype=torch.float64, device=embeddings.device) - removed @ removed.T).float()


def solve(concept: Tensor, target: Tensor, retain: Tensor, projection: Tensor | None) -> Tensor:
    """D `[width, width]` fp32 for token embeddings `[n, width]` of the concept, of what is to stand there in the same
    order, and `[m, width]` of what is to stay; without a projection P is the identity."""
    wide = torch.eye(concept.shape[1], dtype=torch.float64, device=concept.device)
    free = wide if projection is None else projection.double()
    covariance = free @ (gram(concept, concept) + gram(retain, retain)) @ free
    ridge = RIDGE * torch.linalg.eigvalsh(covariance)[-1]
    if ridge <= 0:  # nothing is left to change: D = D P = 0
        return torch.zeros_like(covariance, dtype=torch.float32)
    wanted = gram(target - concept, concept) @ free
    return (wanted @ torch.linalg.inv(covariance + ridge * wide) @ free).float()


def gram(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right in fp64, of which only a part is held at a time: the retain set may be large."""
    parts = zip(left.split(4096), right.split(4096), strict=True)
    return sum((a.double().T @ b.double() for a, b in parts), left.new_zeros((), dtype=torch.float64))


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
    device, matrix = matrix.device, exact(matrix)
    if min(matrix.shape) <= SMALL:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        here = [matrix.device] if is_accelerator(matrix.device) else []
        with torch.random.fork_rng(here, device_type=matrix.device.type):
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(matrix, q=min(rank + OVERSAMPLING, *matrix.shape), niter=ITERATIONS)
        right = right.T
    return left.to(device), sizes.to(device), right.to(device)


def _token_by_token(rows: Tensor, counts: Tensor, prompts: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `prompts` that count, and of `goals` the ones in the same places; past its end a goal's last one."""
    last = counts[goals].sum(dim=1, keepdim=True) - 1
    places = torch.arange(rows.shape[1], device=rows.device).minimum(last)
    target = rows[goals].take_along_dim(places[:, :, None], dim=1)
    here = counts[prompts]
    return rows[prompts][here], target[here]
