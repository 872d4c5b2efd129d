"""Attacks on models of which it is known what they can be made to do."""

import pytest
import torch

from esd_peft import UserError
from esd_peft.attacks.attack import AttackTarget, checkpoints
from esd_peft.attacks.fine_tuning import FineTuning
from esd_peft.attacks.prefix import Prefix, onto_simplex
from esd_peft.attacks.prompts import Prompts
from esd_peft.attacks.textual_inversion import TextualInversion
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.models import open_family

CPU = torch.device("cpu")


@pytest.fixture
def victim(small_sd):
    family = open_family(str(small_sd))
    encoders = load_encoders(family, CPU, torch.float32)
    return Victim(family, family.load_denoiser(torch.float32), encoders, CPU, torch.float32)


@pytest.fixture
def target():
    images = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return AttackTarget("circle", ["a circle", "a red circle"] * 3, images, seed=0)


def loss(victim, target, embeds):
    told = {name: value[:1].expand(len(target.latents), *value.shape[1:]) for name, value in embeds.items()}
    with torch.no_grad():
        return victim.denoising_loss(told, target.latents, torch.Generator().manual_seed(1)).item()


@pytest.mark.parametrize("attack", [TextualInversion(8), Prefix(8), FineTuning(8)], ids=lambda a: a.name)
def test_budgets_start_from_nothing_and_are_kept(attack, victim, target):
    weights = [p.clone() for p in victim.denoiser.parameters()]
    budgets, embeds = [], []
    for budget, made in attack.attempts(victim, target, ["a circle", "the circle", "circle"]):
        assert all(len(value) == 3 for value in made.values())
        budgets.append(budget)
        embeds.append(made["encoder_hidden_states"])
    assert budgets == [0, *checkpoints(8)] == [0, 1, 2, 4, 8]
    torch.testing.assert_close(
        embeds[0], victim.encode_frozen(["a circle", "the circle", "circle"])["encoder_hidden_states"]
    )
    assert victim.nfe == 8 * 8 * 3
    changed = any(not torch.equal(a, b) for a, b in zip(weights, victim.denoiser.parameters(), strict=True))
    assert changed == isinstance(attack, FineTuning)
    assert torch.equal(embeds[0], embeds[-1]) == isinstance(attack, FineTuning)


def test_the_same_seed_finds_the_same(victim, target):
    for attack in (TextualInversion(2), Prefix(2)):
        found = [[*attack.attempts(victim, target, ["a circle"])][-1][1]["encoder_hidden_states"] for _ in range(2)]
        assert torch.equal(*found)


def test_textual_inversion_and_fine_tuning_lower_the_denoising_loss(victim, target):
    for attack in (TextualInversion(60), FineTuning(60)):
        losses = [loss(victim, target, embeds) for _, embeds in attack.attempts(victim, target, ["a circle"])]
        assert losses[-1] < losses[0]


def test_a_prefix_is_of_the_vocabulary(victim, target):
    table = victim.encoders.text_encoder.get_input_embeddings()
    read = []
    handle = table.register_forward_hook(lambda module, args, rows: read.append(rows))
    [*Prefix(2, tokens=3).attempts(victim, target, ["a circle"])]
    handle.remove()
    rows = read[-1][0, 1:4]  # after the start of the prompt
    assert (torch.cdist(rows, table.weight).min(dim=1).values < 1e-5).all()


def test_onto_simplex_is_the_closest_point():
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = onto_simplex(rows)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert (found >= 0).all()
    for _ in range(200):
        other = torch.rand(5, 7, dtype=torch.float64).pow(4)
        other = other / other.sum(dim=1, keepdim=True)
        assert ((other - rows).norm(dim=1) >= (found - rows).norm(dim=1) - 1e-9).all()
    torch.testing.assert_close(onto_simplex(found), found)


def test_lists_of_prompts(tmp_path):
    built_in = Prompts().own_prompts("red cat")
    assert "red cat" in built_in and len(built_in) == len(set(built_in)) > 10 and not any("{" in p for p in built_in)
    (tmp_path / "p.txt").write_text("# mine\n\na {} here\nplain\n")
    assert Prompts(tmp_path / "p.txt").own_prompts("cat") == ["a cat here", "plain"]
    (tmp_path / "p.txt").write_text("# none\n")
    for path in (tmp_path / "p.txt", tmp_path / "no.txt"):
        with pytest.raises(UserError, match="--attack-prompts"):
            Prompts(path)
