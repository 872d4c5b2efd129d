"""The buffer of training samples that denoising trajectories leave behind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.runtime.devices import send


@dataclass
class Buffer:
    """`T` samples, in host memory; in half precision where the denoiser computes in it.

    A batch is gathered on the CPU and sent through pinned memory while the GPU is still busy with the step before. So the
    buffer takes no GPU memory (100 KiB a sample for Stable Diffusion 1.x, 1.5 MiB for FLUX at 1024²), and what is left for
    the GPU to do, to copy a batch of that, is too little to prefetch it on a stream of its own.
    """

    inputs: Tensor  # [T, ...] x_t as the denoiser is fed it, already through scale_model_input
    timesteps: Tensor  # [T]
    teacher: Tensor  # [2 or 3, T, ...] e_null, e_concept and, where a pair has one, e_anchor
    pairs: Tensor  # [T] int64, which pair of the table

    def __len__(self) -> int:
        return len(self.timesteps)

    def index(self, index: Tensor, device: torch.device) -> "Buffer":
        """The samples `index` `[B]`, on `device`."""
        return Buffer(
            send(self.inputs[index], device),
            send(self.timesteps[index], device),
            send(self.teacher[:, index], device),
            send(self.pairs[index], device),
        )


def concatenate(buffers: list[Buffer]) -> Buffer:
    """Buffers one after the other."""
    return Buffer(
        torch.cat([b.inputs for b in buffers]),
        torch.cat([b.timesteps for b in buffers]),
        torch.cat([b.teacher for b in buffers], dim=1),
        torch.cat([b.pairs for b in buffers]),
    )
