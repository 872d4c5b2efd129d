"""How far predictions have moved, as the erase command says it at its end."""

import contextlib

import pytest
import torch

from esd_peft.prompts.plan import mentions
from esd_peft.training import diagnosis
from esd_peft.training.diagnosis import Diagnosis, choose_probes, diagnose
from esd_peft.training.student import Student
from runs import CPU, prepare_short


class Deaf:
    """A student that hears nothing of its prompts, and has a teacher that does."""

    predict_each = Student.predict_each

    def __init__(self, student, null):
        self.student, self.null, self.teaches = student, null, False
        self.family, self.denoiser, self.device, self.dtype = student.family, student.denoiser, CPU, torch.float32

    @contextlib.contextmanager
    def teacher(self):
        self.teaches = True
        yield
        self.teaches = False

    def predict(self, inputs, timesteps, embeds):
        if not self.teaches:
            embeds = {name: value.expand(len(inputs), *value.shape[1:]) for name, value in self.null.items()}
        return self.student.predict(inputs, timesteps, embeds)


def looked_at(model, monkeypatch, deaf=False, **options):
    monkeypatch.setattr(diagnosis, "MANY_WORDS", 5)  # as if the shapes pipeline knew many
    run = prepare_short(model, **options)
    probes = choose_probes(run.family, run.prompts, 0)
    probes.embeds = run.family.encode(probes.texts, CPU, torch.float32)
    probes.add_near(["a star", *probes.listed], run.family.encode(["a star", *probes.listed], CPU, torch.float32))
    if deaf:
        run.rollout.student = Deaf(run.student, run.family.encode([""], CPU, torch.float32))
    before = run.rollout.profiler.nfe
    found = diagnose(run.rollout, run.table, probes, run.config.buffer, 0)
    assert run.rollout.profiler.nfe == before  # it is not counted as the erasure's
    return probes, found


def test_before_training_all_is_left_and_nothing_has_moved(model, monkeypatch):
    probes, found = looked_at(model, monkeypatch, concept=["circle", "red"])
    assert len(found.left) == 12 and [*found.left.values()] == pytest.approx([1.0] * 12, abs=1e-4)
    assert found.near == {"a star": 0.0}  # the others of what was found stand on the list already
    assert len(found.listed) == 6 and set(found.listed.values()) == {0.0}
    assert len(found.unlisted) == 6 and set(found.unlisted.values()) == {0.0}
    assert not any(mentions(concept, text) for concept in ("circle", "red") for text in [*probes.listed, *probes.unlisted])
    (advice,) = found.advice()
    assert advice.startswith("100% of the concept's direction is left")


def test_a_student_that_hears_nothing_has_moved_by_all_that_prompts_say(model, monkeypatch):
    _, found = looked_at(model, monkeypatch, deaf=True, concept=["circle"])
    for moved in (found.listed, found.near, found.unlisted):
        assert [*moved.values()] == pytest.approx([1.0] * len(moved), abs=1e-4)
    assert len([*found.advice()]) >= 3


def test_with_few_words_the_concept_is_looked_at_in_prompts_of_the_plan(model):
    run = prepare_short(model, concept=["circle"], prompt_templates="auto")
    probes = choose_probes(run.family, run.prompts, 0)
    assert {*probes.contexts[0]} <= {*run.prompts.concept_pairs[0]} and not probes.unlisted


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (Diagnosis(left={"a fox": -0.5}, near={"a dog": 0.1}), "nothing stands out"),
        (Diagnosis(left={"a fox": 0.9}), "90% of the concept's direction is left"),
        (Diagnosis({"a fox": 0.0}, near={"a dog": 0.9, "a cat": 0.1}), "1 of 2 prompts like the concept moved far, 'a dog'"),
        (Diagnosis({"a fox": 0.0}, {"a person": 0.7}), "1 of 1 prompts on the list moved far, 'a person' by 70%"),
        (Diagnosis({"a fox": 0.0}, unlisted={"tree sea": 0.7}), "1 of 1 prompts on no list moved far"),
    ],
)
def test_what_it_advises(found, says):
    (advice,) = found.to_dict()["advice"]
    assert advice.startswith(says)
