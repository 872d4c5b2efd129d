"""A run that is interrupted, anywhere and in any way, ends with the same adapter when it is resumed."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from esd_peft import EraseConfig, erase
from esd_peft.errors import UserError
from esd_peft.io.marks import MARK
from esd_peft.io.outputs import new_directory
from esd_peft.options.training import CheckpointOptions
from esd_peft.training import checkpoint
from esd_peft.training.checkpoint import Checkpoints, _digest, _read, fitting
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.student import _AdapterStudent
from esd_peft.training.trainer import Trainer
from runs import read_by

QUICK = {"num_inference_steps": 4, "trajectories": 3, "max_train_steps": 8, "train_batch_size": 4,
         "device": "cpu", "num_validation_images": 0}  # fmt: skip


BY_METHOD = {"layers": {"rank": 2}, "denoiser": {"rank": 2}, "contrastive": {"rank": 2, "learning_rate": 1e-3}}
SAME = ("loss", "training_samples", "synonyms", "diagnosis", "nfe", "trained_parameters")


@pytest.fixture(autouse=True)
def quick(few, eager, monkeypatch):
    """Few prompts and images, the plain loss, and a checkpoint after each step."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)


def test_a_kill_costs_two_minutes_at_most(tmp_path, monkeypatch):
    monkeypatch.undo()
    times = iter([0.0, 119.0, 120.0])
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: next(times))
    with Checkpoints(CheckpointOptions(output=tmp_path / "out"), {}, {}) as there:
        assert [there.is_due(), there.is_due()] == [False, True]


def config(model, output, method="trajectories", **options):
    given = read_by(method, QUICK) | BY_METHOD.get(method, {}) | options
    return EraseConfig(concept="circle", model=str(model), output=output, **given)


class Stop(Exception):
    """Stands for a kill: nothing of ours catches it."""


@pytest.fixture
def stopped_at(monkeypatch):
    """Runs a config and breaks off after that many steps."""

    def run(step, given):
        take = Trainer.step

        def counted(self, *batch_and_loss):
            if self.taken == step:
                raise Stop
            take(self, *batch_and_loss)

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(Trainer, "step", counted)
            erase(given)

    return run


VARIANTS = [
    {},
    {"rollout": "student", "buffer_refresh_interval": 3},
    {"buffer_refresh_interval": 2, "preserve": ["a square", "a star"]},
    {"optimizer": "AdamW8bit", "adapter_type": "none", "scope": "esd-x", "learning_rate": 1e-3},
    {"dtype": "bfloat16", "lr_scheduler": "linear"},
    {"method": "contrastive"},
    {"method": "denoiser", "map_to": "a star"},
    {"method": "denoiser", "preserve": "a square", "unprompted_guidance": 2.0},
    {"method": "layers", "map_to": "a star"},
    {"method": "layers", "preserve": "a square", "unprompted_guidance": 2.0},
    {"method": "layers", "optimizer": "AdamW8bit", "adapter_type": "none", "rank": None, "dtype": "bfloat16"},
]


def adapter(folder):
    name = "denoiser_weights" if (folder / "denoiser_weights.safetensors").is_file() else "adapter_model"
    return load_file(folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def whole_output(tmp_path_factory):
    """Where the default run writes, not interrupted."""
    return tmp_path_factory.mktemp("whole") / "out"


@pytest.fixture(scope="module")
def whole(small_sd, whole_output):
    """The adapter and the result of that run."""
    result = erase(config(small_sd, whole_output))
    return adapter(whole_output), result


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("step", "options"), [(2, {}), (7, {}), (4, VARIANTS[1]), (3, VARIANTS[8]), *((5, options) for options in VARIANTS)]
)
def test_resumed_runs_end_the_same(small_sd, tmp_path, stopped_at, monkeypatch, request, options, step):
    if options:
        result = erase(config(small_sd, tmp_path / "whole", **options))
        expected = adapter(tmp_path / "whole")
    else:
        expected, result = request.getfixturevalue("whole")
    stopped_at(step, config(small_sd, tmp_path / "parts", **options))
    assert not (tmp_path / "parts").exists()
    taken, take = [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda trainer, batch: taken.append(trainer.taken) or take(trainer, batch))
    parts = erase(config(small_sd, tmp_path / "parts", resume=True, **options))
    assert taken == [*range(step, 8)], "from the last checkpoint on"
    assert same(adapter(tmp_path / "parts"), expected)
    for key in SAME:
        assert parts[key] == result[key], key
    assert not (tmp_path / "parts.checkpoint").exists()


@pytest.mark.parametrize("method", ["layers", "trajectories"])
def test_twice_interrupted(small_sd, tmp_path, stopped_at, method):
    result = erase(config(small_sd, tmp_path / "whole", method))
    stopped_at(3, config(small_sd, tmp_path / "parts", method))
    stopped_at(6, config(small_sd, tmp_path / "parts", method, resume=True))
    parts = erase(config(small_sd, tmp_path / "parts", method, resume=True))
    assert same(adapter(tmp_path / "parts"), adapter(tmp_path / "whole"))
    assert all(parts[key] == result[key] for key in SAME)


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_buffer_is_made_again(small_sd, tmp_path, stopped_at, whole, damage):
    stopped_at(5, config(small_sd, tmp_path / "parts"))
    (buffer,) = (tmp_path / "parts.checkpoint").glob("buffer-*")
    if damage is None:  # one bit
        content = bytearray(buffer.read_bytes())
        content[-100] ^= 1
        buffer.write_bytes(content)
    else:
        buffer.write_bytes(damage)
    erase(config(small_sd, tmp_path / "parts", resume=True))
    assert same(adapter(tmp_path / "parts"), whole[0])


def as_before_there_was_one_state(path):
    """What an earlier version wrote: whole, with a state for each stage of a run."""
    tensors, values = _read(path)
    values["state"] = {"pairs": [["training", values["state"]], ["attention", None]]}
    text = json.dumps(values)
    save_file(tensors, path, {"values": text, "sha256": _digest(tensors, text)})


def test_what_cannot_be_resumed(small_sd, tmp_path, stopped_at):
    with pytest.raises(UserError, match="holds no checkpoint; leave --resume out"):
        erase(config(small_sd, tmp_path / "parts", resume=True))
    assert not [*tmp_path.iterdir()]
    stopped_at(5, config(small_sd, tmp_path / "parts"))
    with pytest.raises(UserError, match="add --resume to go on, or --overwrite"):
        erase(config(small_sd, tmp_path / "parts"))
    with pytest.raises(UserError, match=r"learning-rate was 0.01, seed was 0"):
        erase(config(small_sd, tmp_path / "parts", resume=True, seed=1, learning_rate=1e-4))
    (state,) = (tmp_path / "parts.checkpoint").glob("step-*")
    content = bytearray(state.read_bytes())
    as_before_there_was_one_state(state)
    with pytest.raises(UserError, match="was written by another version of esd_peft; resume with that version, or add"):
        erase(config(small_sd, tmp_path / "parts", resume=True))
    content[-9] ^= 4
    state.write_bytes(content)
    with pytest.raises(UserError, match="is damaged; remove"):
        erase(config(small_sd, tmp_path / "parts", resume=True))
    erase(config(small_sd, tmp_path / "parts", overwrite=True))
    assert not (tmp_path / "parts.checkpoint").exists()


def test_an_output_that_cannot_be_written_costs_no_training(small_sd, tmp_path, monkeypatch, whole):
    take, output = Trainer.step, tmp_path / "parts"

    def spoils(self, *batch_and_loss):
        take(self, *batch_and_loss)
        output.mkdir(exist_ok=True)
        (output / "mine").write_text("precious")

    given = config(small_sd, output)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"--output .* is not empty"):
        patch.setattr(Trainer, "step", spoils)
        erase(given)
    assert [path.name for path in output.iterdir()] == ["mine"]
    (output / "mine").unlink()
    monkeypatch.setattr(Trainer, "step", None)
    parts = erase(given.replace(resume=True))
    assert same(adapter(output), whole[0])
    assert parts["loss"] == whole[1]["loss"] and parts["training_samples"] == whole[1]["training_samples"]
    assert not (tmp_path / "parts.checkpoint").exists()


@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_synonyms_stay_of_a_run_that_is_done(small_sd, tmp_path, monkeypatch, method):
    given = config(small_sd, tmp_path / "out", method, max_train_steps=2)
    whole = erase(given.replace(output=tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(_AdapterStudent, "save", lambda *_: (_ for _ in ()).throw(Stop))
        erase(given)
    monkeypatch.setattr(Trainer, "step", None)
    parts = erase(given.replace(resume=True))
    assert parts["synonyms"] == whole["synonyms"] != {} and parts["diagnosis"] == whole["diagnosis"]
    assert same(adapter(tmp_path / "out"), adapter(tmp_path / "whole"))


def test_what_else_the_bits_depend_on(small_sd, tmp_path, stopped_at, capsys, monkeypatch):
    given = config(small_sd, tmp_path / "out")
    stopped_at(5, given)
    with pytest.raises(UserError, match="was computed in float32, not in bfloat16; go on with --dtype float32"):
        erase(given.replace(resume=True, dtype="bfloat16"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    monkeypatch.setattr("esd_peft.runtime.reproducibility.__version__", "0.0.1")
    erase(given.replace(resume=True, dtype="float32"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: --resume")]
    assert len(said) == 1 and "goes on with esd_peft 0.0.1, threads 97: the last bits may be others" in said[0]


def test_a_checkpoint_folder_of_somebody_else(small_sd, tmp_path):
    folder = tmp_path / "out.checkpoint"
    folder.mkdir()
    (folder / "step-1.safetensors").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=r"out.checkpoint holds files that esd_peft did not write"):
            erase(config(small_sd, tmp_path / "out", **options))
    assert (folder / "step-1.safetensors").read_text() == "precious"


@pytest.mark.parametrize("made", ["an adapter", "a merged model", "the checkpoint of e"])
def test_a_checkpoint_folder_that_is_another_output(small_sd, tmp_path, made):
    with new_directory(tmp_path / "out.checkpoint", made, overwrite=False) as draft:
        (draft / "step-00000001.safetensors").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=rf"--output .*out: .*out.checkpoint holds {made}, not the checkpoint of out"):
            erase(config(small_sd, tmp_path / "out", **options))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["mine.safetensors", "step-1.safetensors", "step-copy.safetensors", "buffer.safetensors"])
def test_what_somebody_puts_into_the_folder_stays(small_sd, tmp_path, stopped_at, whole, name):
    stopped_at(5, config(small_sd, tmp_path / "out"))
    folder = tmp_path / "out.checkpoint"
    (step,) = folder.glob("step-*")
    content = shutil.copyfile(step, folder / name).read_bytes()
    erase(config(small_sd, tmp_path / "out", resume=True))
    assert same(adapter(tmp_path / "out"), whole[0]) and (folder / name).read_bytes() == content
    assert {path.name for path in folder.iterdir()} == {MARK, name}
    erase(config(small_sd, tmp_path / "out", overwrite=True))
    assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("name", ["step-00000008.safetensors", f"buffer-{'0' * 16}.safetensors"])
def test_what_somebody_named_as_the_run_would(small_sd, tmp_path, stopped_at, name):
    stopped_at(5, config(small_sd, tmp_path / "out"))
    (tmp_path / "out.checkpoint" / name).write_text("precious")
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match=f"out.checkpoint holds {name}, which this run did not write; move it away"):
            erase(config(small_sd, tmp_path / "out", **options))
    assert (tmp_path / "out.checkpoint" / name).read_text() == "precious"


def test_what_is_written_does_not_tell_how_the_run_got_there(small_sd, tmp_path, stopped_at):
    """All files but for seconds and memory; and the config makes the same again."""
    output, files = tmp_path / "out", {}
    erase(config(small_sd, output))
    files["at once"] = written(output)
    erase(config(small_sd, output, overwrite=True))
    files["anew"] = written(output)
    shutil.rmtree(output)
    stopped_at(5, config(small_sd, output))
    erase(config(small_sd, output, resume=True))
    files["resumed"] = written(output)
    assert files["at once"] == files["anew"] == files["resumed"]
    shutil.rmtree(output)
    again = yaml.safe_load(files["resumed"]["config.yaml"])
    assert again["checkpoint"]["resume"] is again["checkpoint"]["overwrite"] is False
    erase(EraseConfig(**again))
    assert written(output) == files["at once"]


def written(folder):
    """The bytes of each file; without what a run took."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "result.json"}
    result = json.loads((folder / "result.json").read_text())
    return files | {"result": {key: value for key, value in result.items() if key not in ("seconds", "peak_memory_bytes")}}


def test_a_set_of_names_is_written_in_the_same_order_by_every_process(whole, whole_output):
    """Its own order depends on a seed of Python's, which is another one in each."""
    modules = json.loads((whole_output / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 7 and modules == sorted(modules)
    content = (whole_output / "pytorch_lora_weights.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    assert json.loads(header["lora_adapter_metadata"])["unet.target_modules"] == modules
    assert [*header] == sorted(header)


def changed(state, **values):
    """A state, as it is stored, with other values; `...` takes one out."""
    pairs = dict(state["pairs"]) | values
    return {"pairs": [[key, value] for key, value in pairs.items() if value is not ...]}


SPOILT = [
    {"step": ...},
    {"step": "x"},
    {"step": 10**9},
    {"step": -1},
    {"step": [3]},
    {"done": ...},
    {"parameters": []},
    {"parameters": 5},
    {"parameters": [{"tensor": "00000"}] * 500},
    {"optimizer": {"pairs": []}},
    {"optimizer": None},
    {"schedule": {"pairs": [["last_epoch", "x"]]}},
    {"losses": "x"},
    {"unread": [1]},
    {"nfe": None},
    {"source": 5},
    {"source": {"pairs": []}},
    {"optimizer": {"pairs": [["state", {"pairs": []}], ["param_groups", []]]}},
]
ASKED = [
    {"taken": "x"},
    {"before": 3},
    {"generator": 3},
    {"generator": {"tensor": "00000"}},
    {"matches": [[5]]},
    {"matches": []},
    {"matches": ...},
    {"sizes": {"pairs": [["x", 3]]}},
]
SPOILT_SOURCES = {
    "trajectories": [{"taken": "x"}, {"before": 3}, {"generator": 3}, {"shuffled": []}, {"sizes": 5},
                     {"shuffled": [{"pairs": [["order", [10**9]], ["position", 0]]}] * 3}],
    "denoiser": ASKED, "layers": ASKED, "contrastive": [{"generator": 3}, {"order": 5}, {"order": ...}],
}  # fmt: skip


@pytest.mark.parametrize("method", [*SPOILT_SOURCES])
def test_states_that_do_not_fit(small_sd, tmp_path, stopped_at, monkeypatch, method):
    given = config(small_sd, tmp_path / "out", method)
    stopped_at(5, given)
    (path,) = (tmp_path / "out.checkpoint").glob("step-*")
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["values"])
    tensors = load_file(path)
    restored = []
    monkeypatch.setattr(
        TrainingLoop, "_restore", lambda self, *_: restored.append(self) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        erase(given.replace(resume=True))
    monkeypatch.undo()
    restore, source = restored[0]._restore, dict(values["state"]["pairs"])["source"]
    for spoilt in [*SPOILT, *({"source": changed(source, **other)} for other in SPOILT_SOURCES[method])]:
        text = json.dumps(values | {"state": changed(values["state"], **spoilt)})
        save_file(tensors, path, {"values": text, "sha256": _digest(tensors, text)})
        options = given.checkpoint.replace(resume=True)
        checkpoints = Checkpoints(options, values["config"], values["base"], values["made_with"])
        with pytest.raises(UserError, match=r"--resume: the checkpoint does not fit"), fitting():
            restore(checkpoints.load().training)
    path.write_bytes(whole)
    restore(checkpoints.load().training)
