"""The measure behind `--stop-at`."""

import pytest

from esd_peft import EraseConfig, erase
from esd_peft.training.early_stopping import EarlyStopping
from runs import noise, prepare_short, shortest


def measured(run):
    training = run.config.training
    return EarlyStopping(run.rollout, run.table, run.config.buffer, training.stop_at, training.max_train_steps, noise())


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


@pytest.mark.parametrize("method", ["layers", "denoiser", "trajectories"])
def test_every_method_stops_as_soon_as_it_is_enough(small_sd, tmp_path, few, eager, method):
    given = shortest(method, max_train_steps=200, learning_rate=1e-2, train_batch_size=4, checkpointing_steps=1000)
    given |= {"closed_form": False} if method == "trajectories" else {}  # which begins further on
    result = erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "out", stop_at=0.95, **given))
    (first, begun), *_, (last, left) = result["direction_left"]
    assert first == 0 and begun == pytest.approx(1.0, abs=1e-2) and last % 5 == 0
    assert left <= 0.95 and all(fraction > 0.95 for _, fraction in result["direction_left"][:-1])
    assert 0 < last < 200 and result["training_samples"] % last == 0
