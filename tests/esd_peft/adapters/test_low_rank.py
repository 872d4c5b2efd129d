"""Plain LoRAs on linear layers, against PEFT's own merge."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from esd_peft.adapters import low_rank


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.to_k = layer


def adapted(layer=None, **options):
    """PEFT's layer, which has learned something."""
    torch.manual_seed(0)
    layer = layer or nn.Linear(6, 10)
    model = get_peft_model(Model(layer), LoraConfig(r=3, lora_alpha=5, target_modules=["to_k"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.base_model.model.to_k.eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("rows", [3, 512])
def test_it_merges_and_acts_as_peft_does(monkeypatch, options, rows):
    monkeypatch.setattr(low_rank, "ROWS", rows)
    layer, inputs = adapted(**options), torch.randn(4, 6)
    base = layer.get_base_layer().weight.clone()
    found = low_rank.low_rank(layer, base, 1.0)
    torch.testing.assert_close(found.effect(inputs), layer(inputs) - layer.get_base_layer()(inputs))
    layer.merge()
    torch.testing.assert_close(found.merge(), layer.get_base_layer().weight)
    assert torch.equal(found.merge(torch.float16), found.merge().half())
    half = low_rank.low_rank(adapted(**options), base, 0.5)
    torch.testing.assert_close(half.merge(), (base + layer.get_base_layer().weight) / 2)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: adapted(use_dora=True),
        lambda: adapted(lora_bias=True),
        lambda: adapted(nn.Conv2d(6, 10, 3)),
    ],
    ids=["DoRA", "bias", "convolution"],
)
def test_what_is_no_plain_lora_on_a_linear_layer_is_left_to_peft(layer):
    layer = layer()
    assert low_rank.low_rank(layer, layer.get_base_layer().weight, 1.0) is None


def test_values_that_are_not_finite_are_refused():
    layer = adapted()
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        low_rank.low_rank(layer, layer.get_base_layer().weight, 1.0)
