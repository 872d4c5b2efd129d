"""Rounds of --robust: what is found, and that it is erased as the concept is."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, UserError, erase
from esd_peft import robust as module
from esd_peft.adapters import make_student
from esd_peft.backbones import open_backbone
from esd_peft.concepts import plan_prompts
from esd_peft.objectives import ask
from esd_peft.phases import Costs
from esd_peft.rollout import Bank, Rollout, make_table
from families import save_family

CPU = torch.device("cpu")
QUICK = {"num_inference_steps": 3, "trajectories": 2, "max_train_steps": 4, "rank": 4, "device": "cpu", "eval_seeds": 0}


@pytest.fixture
def sparring(small_sd):
    config = EraseConfig(concept=["circle", "star"], model=str(small_sd), robust=1, **QUICK | {"trajectories": 4})
    backbone = open_backbone(config.model)
    plan = plan_prompts(config)
    table = make_table(plan, backbone.encode(plan.texts, CPU, torch.float32))
    student = make_student(backbone, backbone.load_denoiser(torch.float32), config)
    rollout = Rollout(backbone, student.denoiser, table, student.teacher, config, CPU, torch.float32, Costs(CPU))
    return module.Sparring(rollout, plan), plan


def test_found_words_stand_in_the_concepts_wordings(sparring, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 2)
    sparring, plan = sparring
    with sparring.known:
        found = sparring.meet(0)
        assert len(sparring.meet(1).erasing_pairs) > len(found.erasing_pairs)
        names = ("circle", "star")
        words = [pair.found for pair in found.erasing_pairs if pair.found and pair.prompt in names]
        embeds = sparring.victim.told(words)["encoder_hidden_states"]
    for before, after in zip(plan.erasing, found.erasing, strict=True):
        assert after[: len(before)] == before
        new = after[len(before) :]
        assert len(new) == module.WORDS * len(before) and {p.prompt for p in new} == {p.prompt for p in before}
        assert all(p.found not in (None, p.prompt) and p.eta == 1 for p in new)
    assert len(embeds.flatten(1).unique(dim=0)) == len(words) == 2 * module.WORDS  # each word is one of its own


def test_found_words_bring_the_student_closer_to_what_the_teacher_predicts(sparring):
    """The student's keys and values are changed; a word is to undo that."""
    sparring, _ = sparring
    rollout, bank = sparring.rollout, sparring.banks[0]
    with torch.no_grad():
        for name, parameter in rollout.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def distance(prompt):
        embeds = sparring.victim.told([prompt] * len(bank))
        with torch.no_grad():
            seen = rollout.backbone.predict(rollout.denoiser, bank.inputs, bank.timesteps, embeds)
        return (seen - bank.teacher[1]).square().mean().item()

    with sparring.known:
        pairs = sparring._find(0, 0)
        best = min(distance(p.found) for p in pairs if p.prompt == "circle")
    assert best < distance("circle")


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
    for name, rounds in (("a", 2), ("b", 2), ("c", 0)):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / name, robust=rounds, **QUICK))
        made.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_what_it_does_not_go_with():
    for options in ({"objective": "contrastive", "null_space": 0}, {"until": 0.5}):
        with pytest.raises(UserError, match="--robust works with"):
            EraseConfig(concept="circle", robust=1, **options)
