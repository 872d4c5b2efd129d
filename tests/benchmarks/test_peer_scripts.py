"""What the peers' own scripts leave is read as they mean it."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("peer_scripts")


def test_lecos_lora_becomes_part_of_the_weights(module, tmp_path):
    denoiser = nn.ModuleDict({"proj_in": nn.Conv2d(4, 6, 1), "to_k": nn.Linear(3, 5)})
    given = {"proj_in": torch.randn(2, 4, 3, 3), "to_k": torch.randn(2, 3)}
    state, wanted = {}, {}
    for name, x in given.items():
        whole, size = denoiser[name], [1] if name == "proj_in" else []
        down = type(whole)(x.shape[1], 2, *size, bias=False)
        up = type(whole)(2, len(whole.weight), *size, bias=False)
        state |= {f"lora_unet_{name}.lora_down.weight": down.weight, f"lora_unet_{name}.lora_up.weight": up.weight}
        state[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        wanted[name] = whole(x) + up(down(x)) / 2  # alpha 1, rank 2
    (tmp_path / "made").mkdir()
    save_file({key: value.detach() for key, value in state.items()}, tmp_path / "made" / "made_last.safetensors")
    module._read_lora(denoiser, tmp_path)
    for name, x in given.items():
        torch.testing.assert_close(denoiser[name](x), wanted[name])


def test_weights_that_the_model_lacks_are_no_result(module, tmp_path):
    (tmp_path / "made").mkdir()
    save_file({"to_q.weight": torch.zeros(1)}, tmp_path / "made" / "esd.safetensors")
    with pytest.raises(AssertionError, match="to_q"):
        module._read_weights(nn.ModuleDict({"to_k": nn.Linear(3, 5)}), tmp_path)
