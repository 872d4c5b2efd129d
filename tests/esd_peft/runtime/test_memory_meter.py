"""What is counted besides the tensors that a forward pass names."""

import torch
from torch import nn

from esd_peft.runtime.memory_meter import track_memory


def peak(network, shape, **options):
    with track_memory(network, **options) as meter, torch.no_grad():
        network(torch.zeros(shape, device="meta"))
    return meter.peak


def test_group_norm_on_a_gpu_copies_images_to_another_layout_and_back():
    network = nn.Sequential(nn.Conv2d(4, 16, 3, device="meta"), nn.GroupNorm(4, 16, device="meta"))
    of_the_norm = 4 * 2 * 16 * 30 * 30
    assert peak(network, (2, 4, 32, 32), channels_last=True) - peak(network, (2, 4, 32, 32)) == 2 * of_the_norm


def test_where_there_are_no_images_there_is_no_other_layout():
    network = nn.GroupNorm(4, 16, device="meta")
    assert peak(network, (2, 16, 7), channels_last=True) == peak(network, (2, 16, 7))
