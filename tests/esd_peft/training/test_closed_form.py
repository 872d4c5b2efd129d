"""Where layers that read the prompt may not act, and what they start from."""

import pytest
import torch

from esd_peft.models import open_family
from esd_peft.models.quantize import load_quantized
from esd_peft.options.training import StudentOptions
from esd_peft.training.closed_form import factors, null_space_projection, solve
from esd_peft.training.student import make_student

CPU, WIDTH = torch.device("cpu"), 24


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_projection_removes_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(3, 20, generator=generator)
    kept = torch.randn(50, 3, generator=generator) @ spread + 1e-4 * torch.randn(50, 20, generator=generator)
    projection = null_space_projection(kept, 0.999)
    torch.testing.assert_close(projection @ projection, projection, atol=1e-5, rtol=1e-4)
    assert (kept @ projection).norm() < 1e-2 * kept.norm()
    assert round(projection.trace().item()) == 17  # three directions are gone
    other = torch.randn(20, generator=generator)
    assert (other @ projection).norm() > 0.5 * other.norm()


def test_where_nothing_is_left_nothing_changes():
    """Embeddings of zeros, or a null space that holds all of a concept's."""
    concept, target = draw(2, 5, 6)
    for change in (solve(0 * concept, target, 0 * concept, None), solve(concept, target, concept, torch.zeros(6, 6))):
        assert change.dtype == torch.float32 and torch.equal(change, torch.zeros(6, 6))


def test_something_is_always_left_to_learn_in():
    assert round(null_space_projection(torch.eye(6), 0.9999).trace().item()) == 1


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


@pytest.mark.parametrize("adapter_type", ["lora", "none"])
def test_protected_prompts_get_the_same_prediction_after_any_training(small_sd, adapter_type):
    family = open_family(str(small_sd))
    denoiser = family.load_denoiser(torch.float32)
    generator = torch.Generator().manual_seed(0)
    protected, other = torch.randn(2, 1, 16, 24, generator=generator)
    protected[:, 4:] = protected[:, :1]  # few tokens, so that directions are left
    latents = torch.randn(1, 4, 16, 16, generator=generator)

    @torch.no_grad()
    def predict(embeds):
        return family.predict(denoiser, latents, torch.tensor([300]), {"encoder_hidden_states": embeds})

    before = predict(protected), predict(other)
    projection = null_space_projection(protected.flatten(0, 1), 0.999999)
    rank = None if adapter_type == "none" else 8
    options = StudentOptions(adapter_type=adapter_type, scope="esd-x-strict", rank=rank, alpha=rank)
    projections = {"encoder_hidden_states": projection}
    student = make_student(family, denoiser, options, CPU, torch.float32, projections=projections)
    with torch.no_grad():
        for p in student.parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    assert (predict(protected) - before[0]).abs().max() > 1e-3
    student.project()
    torch.testing.assert_close(predict(protected), before[0], atol=2e-5, rtol=1e-4)
    assert (predict(other) - before[1]).abs().max() > 1e-3


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


LORA = {"rank": WIDTH, "alpha": WIDTH}


@pytest.mark.parametrize(
    ("options", "quantize"),
    [
        (LORA, "none"),
        (LORA | {"alpha": 4.0}, "none"),
        ({"adapter_type": "none"}, "none"),
        (LORA, "nf4"),
        (LORA, "int8"),
    ],
    ids=str,
)
def test_students_start_from_it_and_teachers_do_not(small_sd, options, quantize):
    family = open_family(str(small_sd))
    denoiser = family.load_denoiser(torch.float32)
    if quantize != "none":
        denoiser = load_quantized(family, quantize, torch.float32, CPU)
    name = next(n for n, m in denoiser.named_modules() if n.endswith("attn2.to_v"))
    student = make_student(family, denoiser, StudentOptions(scope="esd-x", **options), CPU, torch.float32)
    layer = denoiser.get_submodule(name)
    x, change = draw(3, WIDTH), 0.1 * draw(WIDTH, WIDTH, seed=1)
    with torch.no_grad():
        before, expected = layer(x), layer(x + x @ change.T)
        student.start_from({"encoder_hidden_states": change})
        torch.testing.assert_close(layer(x), expected, atol=3e-2 if quantize == "int8" else 1e-5, rtol=1e-3)
        with student.teacher():
            torch.testing.assert_close(layer(x), before, atol=1e-6, rtol=1e-5)
    assert (expected - before).abs().max() > 1e-3
