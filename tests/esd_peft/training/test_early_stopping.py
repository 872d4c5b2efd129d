"""The measure behind `--stop-at`."""

import pytest

from esd_peft.training.early_stopping import EarlyStopping
from runs import noise, prepare_short


def measured(run):
    return EarlyStopping(run.rollout, run.table, run.config.buffer, run.config.training.stop_at, noise())


def test_it_reads_how_much_of_the_direction_is_left(model):
    ours = prepare_short(model, concept=["circle"], stop_at=0.0)
    stopping = measured(ours)
    assert stopping.measure(0) == pytest.approx(1.0, abs=1e-3)  # the student is the teacher yet
    table = ours.table
    table.prompts = table.neutrals  # a student that no longer hears the concept
    assert stopping.measure(1) == pytest.approx(0.0, abs=1e-3)
    assert [step for step, _ in stopping.curve] == [0, 1]


def test_it_asks_about_every_concept(model):
    names = ["circle", "red", "striped", "star"]
    stopping = measured(prepare_short(model, concept=names, stop_at=0.0))
    concept_of = {pair: i for i, pairs in enumerate(stopping.table.concepts) for pair in pairs}
    asked = [concept_of[int(pair)] for pair in stopping.samples.pairs]
    assert [asked.count(i) for i in range(4)] == [4, 4, 4, 4]
