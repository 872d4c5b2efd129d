"""What keys and values start from."""

import pytest
import torch

from esd_peft.config import EraseConfig
from esd_peft.models import open_backbone
from esd_peft.models.quantize import load_quantized
from esd_peft.training.closed_form import factors, solve
from esd_peft.training.nullspace import null_space_projection
from esd_peft.training.student import make_student

WIDTH = 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_concept_goes_to_its_target_and_the_rest_stays():
    concept, target, held, protected = draw(4, 5, 40)
    projection = null_space_projection(protected, 0.9999)
    change = solve(concept, target, held, projection)
    torch.testing.assert_close(change @ projection, change, atol=1e-5, rtol=1e-4)
    moved = concept + concept @ change.T
    assert (moved - target).norm() < 0.05 * (concept - target).norm()
    assert (held @ change.T).norm() < 0.05 * held.norm()
    assert (protected @ change.T).norm() < 1e-4 * protected.norm()
    free = solve(concept, target, held, None)
    assert (concept + concept @ free.T - target).norm() < 0.05 * (concept - target).norm()


def test_what_is_both_named_and_held_meets_in_the_middle():
    x, target = draw(1, 8), draw(1, 8, seed=1)
    moved = x + x @ solve(x, target, x, None).T
    torch.testing.assert_close(moved, (x + target) / 2, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_factors_are_the_best_of_their_rank(rank):
    change = draw(6, 7)
    up, down = factors(change, rank)
    assert up.shape == (6, rank) and down.shape == (rank, 7)
    missing = torch.linalg.svdvals(change)[rank:].norm()
    assert (up @ down - change).norm() == pytest.approx(missing.item(), abs=1e-5)
    assert up.norm() == pytest.approx(down.norm().item(), rel=1e-4)


@pytest.mark.parametrize("rank", [8, 64])
def test_factors_of_a_large_layer_are_as_good_and_the_same_every_time(rank):
    """Of one whose singular values fall slowly, as those of a change of keys do."""
    left, right = (torch.linalg.qr(draw(side, 200, seed=side)).Q for side in (640, 768))
    sizes = 4 * torch.exp(-torch.arange(200) / 25)
    change = (left * sizes) @ right.T
    torch.manual_seed(3)
    up, down = factors(change, rank)
    assert (up @ down - change).norm() < 1.001 * sizes[rank:].norm()
    state = torch.random.get_rng_state()
    again = factors(change, rank)
    assert torch.equal(again[0], up) and torch.equal(again[1], down)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 4.0}, {"adapter": "none"}, {"quantize": "nf4"}, {"quantize": "int8"}], ids=str
)
def test_students_start_from_it_and_teachers_do_not(small_sd, options):
    config = EraseConfig(concept="x", scope="esd-x", rank=None if "adapter" in options else WIDTH, **options)
    backbone = open_backbone(str(small_sd))
    denoiser = backbone.load_denoiser(torch.float32)
    if config.quantize != "none":
        denoiser = load_quantized(backbone, config.quantize, torch.float32, torch.device("cpu"))
    name = next(n for n, m in denoiser.named_modules() if n.endswith("attn2.to_v"))
    student = make_student(backbone, denoiser, config)
    layer = denoiser.get_submodule(name)
    x, change = draw(3, WIDTH), 0.1 * draw(WIDTH, WIDTH, seed=1)
    with torch.no_grad():
        before, expected = layer(x), layer(x + x @ change.T)
        student.start_from({"encoder_hidden_states": change})
        torch.testing.assert_close(layer(x), expected, atol=3e-2 if config.quantize == "int8" else 1e-5, rtol=1e-3)
        with student.teacher():
            torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3
