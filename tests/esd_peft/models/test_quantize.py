"""Linear layers in 4 and 8 bits, and everything else where bitsandbytes is not."""

import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from esd_peft.models import open_family
from esd_peft.models.quantize import load_quantized

CPU = torch.device("cpu")


@pytest.mark.parametrize(("how", "within"), [("nf4", 0.12), ("int8", 0.012)])
def test_layers_hold_the_weights_of_the_files(small_sd, how, within, monkeypatch):
    def drawn(*args, **kwargs):
        raise AssertionError("a weight that is overwritten was drawn at random")

    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *args, **kwargs: self if self.is_meta else drawn())
    family = open_family(str(small_sd))
    plain, packed = family.load_denoiser(torch.float32), load_quantized(family, how, torch.float32, CPU)
    linear = [name for name, module in plain.named_modules() if type(module) is nn.Linear]
    assert len(linear) > 20
    for name in linear:
        layer, one = packed.get_submodule(name), torch.eye(plain.get_submodule(name).in_features)
        weight = (layer(one) - layer(torch.zeros_like(one))).detach()
        assert (weight.T - plain.get_submodule(name).weight).norm() <= within * plain.get_submodule(name).weight.norm()
    for name, value in plain.named_parameters():
        if name.rpartition(".")[0] not in linear or name.endswith("bias"):
            torch.testing.assert_close(packed.get_parameter(name), value)
    kinds = {type(packed.get_submodule(name)) for name in linear}
    assert kinds == {bnb.nn.Linear4bit if how == "nf4" else bnb.nn.Linear8bitLt}


WITHOUT = """
import sys
sys.modules["bitsandbytes"] = sys.modules["triton"] = None  # as on Windows
import esd_peft.models.quantize, esd_peft.training.trainer
from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, UserError, erase, evaluate, merge_adapter
model, folder = sys.argv[1:]
quick = {"num_inference_steps": 2, "trajectories": 1, "max_train_steps": 2, "rank": 2, "num_validation_images": 0}
quick |= {"concept": "circle", "model": model, "device": "cpu"}
erase(EraseConfig(output=folder + "/erased", **quick))
merge_adapter(MergeConfig(adapter=folder + "/erased", output=folder + "/merged"))
for job, options in (
    (lambda o: erase(EraseConfig(output=folder + "/no", **quick | o)), {"quantize": "nf4"}),
    (lambda o: erase(EraseConfig(output=folder + "/no", **quick | o)), {"quantize": "int8"}),
    (lambda o: erase(EraseConfig(output=folder + "/no", **quick | o)), {"optimizer": "AdamW8bit"}),
    (lambda o: evaluate(EvaluateConfig(erased=folder + "/erased", output=folder + "/no", **o)), {"quantize": "nf4"}),
):
    try:
        job(options)
    except UserError as error:
        print(error)
"""


def test_only_what_needs_bitsandbytes_is_refused_without_it(small_sd, tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT, small_sd, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line.split(" needs the package bitsandbytes")[0] for line in said] == [
        "--quantize nf4", "--quantize int8", "--optimizer AdamW8bit", "--quantize nf4",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["erased", "merged"]
