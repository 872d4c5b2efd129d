"""Rounds of --robust: what is found, and that it is erased as the concept is."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, UserError, erase
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.models import open_backbone
from esd_peft.prompts.plan import plan_prompts
from esd_peft.runtime.profiling import Costs
from esd_peft.runtime.seeds import generator
from esd_peft.training import adversarial as module
from esd_peft.training.esd import ask
from esd_peft.training.rollout import Bank, Rollout, make_table
from esd_peft.training.student import make_student
from families import save_family

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 3, "trajectories": 2, "max_train_steps": 6, "rank": 4, "device": "cpu", "eval_seeds": 0}


@pytest.fixture
def target(small_sd):
    config = EraseConfig(
        concept=["circle", "star"], model=str(small_sd), robust=2, scope="esd-x-strict", **QUICK | {"trajectories": 4}
    )
    backbone = open_backbone(config.model)
    plan = plan_prompts(config)
    table = make_table(plan, backbone.encode(plan.texts, CPU, torch.float32))
    student = make_student(backbone, backbone.load_denoiser(torch.float32), config)
    rollout = Rollout(backbone, student.denoiser, table, student.teacher, config, CPU, torch.float32, Costs(CPU))
    return module.RobustTarget(rollout, plan)


@pytest.mark.parametrize(("steps", "rounds", "parts"), [(40, 0, [40]), (280, 3, [40, 80, 80, 80]), (8, 3, [1, 2, 2, 3])])
def test_every_round_is_twice_as_long_as_the_start(steps, rounds, parts):
    assert module.steps_of_rounds(steps, rounds) == parts


def test_the_table_grows_round_by_round(target, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 1)
    plain = len(target.rollout.table.prompts)
    wordings = target.rollout.table.erasing
    sizes = [len(target.rollout.table.prompts) for _ in target.batches(generator(0, "bank"))]
    assert sizes == [plain, *[plain + module.WORDS * wordings] * 2, *[plain + 2 * module.WORDS * wordings] * 3]
    table = target.rollout.table
    assert sum(map(len, table.concepts)) == table.erasing
    (first, *_), *_ = table.concepts
    same = (table.prompts == table.prompts[first]) & (table.asked != table.prompts)  # "circle" with each word in its place
    found = table.embeds["encoder_hidden_states"][table.asked[same]]
    # the first word of a round starts at the concept itself, and nothing learned in between
    assert len(found.flatten(1).unique(dim=0)) >= 2 * module.WORDS - 1


def test_found_words_bring_the_student_closer_to_what_the_teacher_predicts(target):
    """The student's keys and values are changed; a word is to undo that."""
    rollout = target.rollout
    with torch.no_grad():
        for name, parameter in rollout.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([rollout.table.concepts[0][0]] * 2)
    bank = dataclasses.replace(rollout, config=rollout.config.model_copy(update={"anticipate": 0.0})).fill(
        rows, generator(1, "others"), progress=False
    )
    victim = Victim(
        rollout.backbone, rollout.denoiser, load_encoders(rollout.backbone, CPU, torch.float32), CPU, torch.float32
    )
    tokens = NewTokens(victim.encoders, ["<a>", "<b>"])

    def distance(prompt):
        embeds = victim.told([prompt] * len(bank))
        with torch.no_grad():
            seen = rollout.backbone.predict(rollout.denoiser, bank.inputs, bank.timesteps, embeds)
        return (seen - bank.teacher[1]).square().mean().item()

    with tokens.known():
        target._find(victim, tokens, 0, 0)
        assert min(map(distance, tokens.words)) < distance("circle")


def test_the_student_is_asked_with_the_word_and_told_what_the_concept_is_told():
    plan = plan_prompts(EraseConfig(concept="circle"))
    first = plan.erasing[0][0]
    new = dataclasses.replace(plan, erasing=[[first, dataclasses.replace(first, found="<x>")]])
    embeds = {"encoder_hidden_states": torch.arange(len(new.texts)).float()[:, None, None]}
    table = make_table(new, embeds)
    assert new.texts[int(table.prompts[1])] == first.prompt and new.texts[int(table.asked[1])] == "<x>"
    two = torch.zeros(2, 2, 1)
    batch = ask(Bank(two[0], torch.zeros(2), two, torch.tensor([0, 1])), table, 2, [])
    rows = batch.embeds["encoder_hidden_states"].flatten().long().tolist()
    assert [new.texts[row] for row in rows] == [first.prompt, "<x>"]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_same_seed_makes_the_same_adapter(family, small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    model = small_sd if family == "sd" else save_family(family, tmp_path / "model")
    made = []
    for name, rounds in (("a", 2), ("b", 2), ("c", 1)):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / name, robust=rounds, **QUICK))
        made.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_what_it_does_not_go_with():
    for options in ({"objective": "contrastive", "null_space": 0}, {"until": 0.5}):
        with pytest.raises(UserError, match="--robust works with"):
            EraseConfig(concept="circle", robust=1, **options)
    with pytest.raises(UserError, match="--robust 2 needs --max-train-steps of at least 5"):
        EraseConfig(concept="circle", robust=2, max_train_steps=4)


def test_what_it_leaves_to_the_user():
    plain, robust = EraseConfig(concept="circle"), EraseConfig(concept="circle", robust=3)
    assert (plain.learning_scope, robust.learning_scope) == ("esd-x-strict", "full")
    assert robust.guided_steps == sum(module.steps_of_rounds(robust.guided_steps, 3)) == 7 * plain.guided_steps
    own = EraseConfig(concept="circle", robust=3, scope="esd-x", rank=5, hold=0.25, null_space=0.5)
    assert [own.learning_scope, own.adapter_rank, own.held_share, own.protected_energy] == ["esd-x", 5, 0.25, 0.5]
