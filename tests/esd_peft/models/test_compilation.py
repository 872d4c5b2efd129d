"""--compile: the same training, without surprises."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from esd_peft import EraseConfig, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.errors import UserError
from esd_peft.models import compilation, open_family
from esd_peft.training.work import count_denoiser_calls
from families import draw_small, save_family

QUICK = {"num_inference_steps": 4, "trajectories": 3, "max_train_steps": 12, "train_batch_size": 4,
         "learning_rate": 1e-2, "device": "cpu", "num_validation_images": 0}  # fmt: skip


def run(model, output, **options):
    return erase(EraseConfig(concept="circle", model=str(model), output=output, **(QUICK | options)))


def compiled_and_eager(model, tmp_path, **options):
    """Losses of both, and how many graphs were compiled."""
    eager = run(model, tmp_path / "eager", **options, compile="off")
    torch.compiler.reset()
    counters.clear()
    ours = run(model, tmp_path / "compiled", **options, compile="on")
    assert ours["nfe"] == eager["nfe"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    return ours["loss"], eager["loss"], counters["stats"]["unique_graphs"]


def test_compiled_training_has_the_eager_losses(small_sd, tmp_path, monkeypatch):
    """One block through the real compiler, which is slow on a CPU; the others by the test below."""
    every = compilation.repeated_blocks
    monkeypatch.setattr(compilation, "repeated_blocks", lambda denoiser: every(denoiser)[:1])
    ours, eager, graphs = compiled_and_eager(small_sd, tmp_path)
    assert ours == pytest.approx(eager, rel=1e-3)
    assert graphs == 3  # what checks that it works, the teacher, the student


@pytest.mark.parametrize(
    ("options", "modes"),
    [
        ({"rollout": "student", "buffer_refresh_interval": 5}, 3),  # the student alone, too
        ({"adapter_type": "none", "scope": "esd-u", "gradient_checkpointing": True, "learning_rate": 1e-4}, 2),
        ({"scope": "esd-x", "quantize": "nf4"}, 2),
    ],
    ids=lambda o: "-".join(map(str, o.values())) if isinstance(o, dict) else "",
)
def test_every_batch_size_is_served_by_the_same_graphs(small_sd, tmp_path, monkeypatch, options, modes):
    """Blocks of a kind share a graph; teacher, training and the student alone have one each, whatever the batch. Graphs
    are taken here, of every other block, and run without being lowered, which the test above is for."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    every = compilation.repeated_blocks
    monkeypatch.setattr(compilation, "repeated_blocks", lambda denoiser: every(denoiser)[::2])
    ours, eager, graphs = compiled_and_eager(small_sd, tmp_path, **options)
    assert ours == pytest.approx(eager, rel=1e-3)
    kinds = 10  # in this UNet: by their sizes, and by whether their input has a gradient
    assert graphs <= 1 + modes * kinds


def test_the_denoiser_is_eager_again_afterwards(small_sd, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *args, **kwargs: seen.append(1) or forward(*args, **kwargs))
    monkeypatch.setitem(erase.__globals__, "save_adapter", lambda save, *_: seen.append(save.__self__.denoiser))
    (tmp_path / "erased").mkdir()
    run(small_sd, tmp_path / "erased", compile="on")
    denoiser = seen.pop()
    before = len(seen)
    assert before > 100
    denoiser(torch.zeros(1, 4, 16, 16), torch.tensor([1]), torch.zeros(1, 16, 24))
    assert len(seen) == before


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux dev", "pixart", "sana", "z-image"])
def test_every_family_is_compiled_block_by_block(tmp_path, name):
    blocks = compilation.repeated_blocks(open_family(str(save_family(name, tmp_path / "model"))).empty_denoiser())
    kinds = {type(block).__name__ for block in blocks}
    assert any("TransformerBlock" in kind for kind in kinds) and not any("Model" in kind for kind in kinds)


def test_a_transformer_trains_the_same_when_compiled(tmp_path, monkeypatch):
    """FLUX: its blocks are also given rotary embeddings, whose first dimension is no batch."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    draw_small(monkeypatch)
    ours, eager, graphs = compiled_and_eager(save_family("flux dev", tmp_path / "model"), tmp_path, max_train_steps=2)
    assert ours == pytest.approx(eager, rel=1e-3)
    assert graphs <= 1 + 2 * 4


def broken(*_, **__):
    raise RuntimeError("no C++ compiler\nto be found")


def test_on_is_refused_where_nothing_can_be_compiled(small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"--compile on .*no C\+\+ compiler to be found.*auto or off"):
        run(small_sd, tmp_path / "erased", compile="on")
    assert not (tmp_path / "erased").exists()


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ({"max_train_steps": 5000}, True),
        ({}, False),  # 25 + 40 calls: not worth it
        ({"max_train_steps": 5000, "device": "cpu"}, False),
        ({"max_train_steps": 5000, "compile": "off"}, False),
        ({"rollout": "student", "buffer_refresh_interval": 1, "train_batch_size": 1, "preservation_ratio": 0.0}, True),
    ],
)
def test_auto_compiles_long_runs_on_a_gpu_and_says_when_it_cannot(monkeypatch, capsys, options, noted):
    monkeypatch.setattr(compilation, "_obstacle", lambda device: "no Triton")
    device, denoiser = options.get("device", "cuda"), torch.nn.Linear(2, 2)
    config, _ = resolve(EraseConfig(concept="circle", **options | {"device": "cpu"}), open_family("shapes"))
    calls = count_denoiser_calls(config.buffer, config.training)
    with compilation.compiled(denoiser, config.runtime.compile, calls, torch.device(device)):
        assert "forward" not in vars(denoiser)
    assert ("note: nothing is compiled" in capsys.readouterr().err) == noted
