"""Rounds of --robust: what is found, and that it is erased as the concept is."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from esd_peft import EraseConfig, UserError, erase
from esd_peft.attacks.tokens import NewTokens
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.defaults import resolve
from esd_peft.models import open_family
from esd_peft.prompts.options import PromptOptions
from esd_peft.prompts.plan import plan_prompts
from esd_peft.prompts.table import make_table
from esd_peft.runtime.seeds import generator
from esd_peft.training import adversarial as module
from esd_peft.training.batches import collate
from esd_peft.training.buffer import Buffer
from esd_peft.training.work import stages
from esd_peft.worlds import WORLDS
from families import save_family
from runs import CPU, prepare

SHORT = {"num_inference_steps": 3, "trajectories": 2, "max_train_steps": 6, "rank": 4}
QUICK = SHORT | {"device": "cpu", "num_validation_images": 0}


@pytest.fixture
def sampler(small_sd):
    run = prepare(small_sd, concept=["circle", "star"], robust=2, scope="esd-x-strict", **SHORT | {"trajectories": 4})
    config, draws = run.config, generator(0, "bank")
    return module.AdversarialSampler(run.rollout, run.prompts, run.table, config.buffer, config.training, draws)


def test_the_table_grows_round_by_round(sampler, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_STEPS", 1)
    plain, erasing = len(sampler.table), sampler.table.num_concept_pairs
    sizes = []
    for _ in range(SHORT["max_train_steps"]):
        next(sampler)
        sizes.append(len(sampler.sampler.table))
    assert sizes == [plain, *[plain + module.WORDS * erasing] * 2, *[plain + 2 * module.WORDS * erasing] * 3]
    table = sampler.sampler.table
    assert sum(map(len, table.concepts)) == table.num_concept_pairs
    (first, *_), *_ = table.concepts
    # "circle" with each word in its place
    same = (table.prompts == table.prompts[first]) & (table.student_prompts != table.prompts)
    found = table.embeds["encoder_hidden_states"][table.student_prompts[same]]
    # the first word of a round starts at the concept itself, and nothing learned in between
    assert len(found.flatten(1).unique(dim=0)) >= 2 * module.WORDS - 1


def test_found_words_bring_the_student_closer_to_what_the_teacher_predicts(sampler):
    """The student's keys and values are changed; a word is to undo that."""
    rollout, student, table = sampler.rollout, sampler.rollout.student, sampler.table
    with torch.no_grad():
        for name, parameter in student.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rows = torch.tensor([table.concepts[0][0]] * 2)
    options = sampler.buffer.replace(guided_rollout_ratio=0.0)
    samples = rollout.collect(table, rows, options, generator(1, "others"), progress=False)
    encoders = load_encoders(student.family, CPU, torch.float32)
    victim = Victim(student.family, student.denoiser, encoders, CPU, torch.float32)
    tokens = NewTokens(victim.encoders, ["<a>", "<b>"])

    def distance(prompt):
        embeds = victim.encode([prompt] * len(samples))
        with torch.no_grad():
            seen = student.predict(samples.inputs, samples.timesteps, embeds)
        return (seen - samples.teacher[1]).square().mean().item()

    with tokens.known():
        sampler._find(victim, tokens, 0, 0)
        assert min(map(distance, tokens.words)) < distance("circle")


def test_the_student_is_given_the_word_and_held_to_what_the_concept_is_held_to():
    plan = plan_prompts(PromptOptions(concept="circle"), WORLDS["shapes"], robust=False)
    first = plan.concept_pairs[0][0]
    new = dataclasses.replace(plan, concept_pairs=[[first, dataclasses.replace(first, adversarial="<x>")]])
    embeds = {"encoder_hidden_states": torch.arange(len(new.texts)).float()[:, None, None]}
    table = make_table(new, embeds)
    assert new.texts[int(table.prompts[1])] == first.prompt and new.texts[int(table.student_prompts[1])] == "<x>"
    two = torch.zeros(2, 2, 1)
    batch = collate(Buffer(two[0], torch.zeros(2), two, torch.tensor([0, 1])), table, 2, [])
    rows = batch.embeds["encoder_hidden_states"].flatten().long().tolist()
    assert [new.texts[row] for row in rows] == [first.prompt, "<x>"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_same_seed_makes_the_same_adapter(kind, small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_STEPS", 2)
    model = small_sd if kind == "sd" else save_family(kind, tmp_path / "model")
    made = []
    for name, rounds in (("a", 2), ("b", 2), ("c", 1)):
        erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / name, robust=rounds, **QUICK))
        made.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert any(not torch.equal(made[0][name], made[2][name]) for name in made[0])


def test_what_it_does_not_go_with():
    for options in ({"objective": "contrastive", "null_space": 0}, {"stop_at": 0.5}):
        with pytest.raises(UserError, match="--robust works with"):
            EraseConfig(concept="circle", robust=1, **options)
    with pytest.raises(UserError, match="--robust 2 needs --max-train-steps of at least 5"):
        EraseConfig(concept="circle", robust=2, max_train_steps=4)


def test_what_it_leaves_to_the_user():
    family = open_family("shapes")
    plain, robust = (resolve(EraseConfig(concept="circle", robust=rounds), family)[0] for rounds in (0, 3))
    assert (plain.student.scope, robust.student.scope) == ("esd-x-strict", "full")
    assert robust.training.max_train_steps == sum(stages(robust.training)) == 7 * plain.training.max_train_steps
    given = {"scope": "esd-x", "rank": 5, "preservation_ratio": 0.25, "null_space": 0.5}
    own = resolve(EraseConfig(concept="circle", robust=3, **given), family)[0].flat()
    assert {name: own[name] for name in given} == given
