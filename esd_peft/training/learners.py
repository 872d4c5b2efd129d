"""Learners: the denoiser with one output, or its cross-attention layers with one output each.

Both answer one question, `predict(samples, embeds)`: what comes out for so many samples, each with a prompt. It is asked of
the student and, with the adapter disabled, of the teacher.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from esd_peft.models.family import TOKENS, PromptEmbeds
from esd_peft.runtime.devices import fetch, finish, send
from esd_peft.training.student import Student

Samples = dict[str, Tensor]  # [B, ...] each
Outputs = dict[str, Tensor]  # [B, ...] each

POSITIONS = 8  # of a layer's hidden states are kept of each sample: attention answers each by itself
PREDICTION = "prediction"  # the denoiser's output


class Learner(ABC):
    """A student, seen as outputs that depend on samples and prompts."""

    evaluations: ClassVar[int]  # of the denoiser that a sample takes
    part: ClassVar[str]  # of the run's work; what an answer and a training step count as (`flops.CallCosts`)
    answer: ClassVar[str]
    step: ClassVar[str]

    def __init__(self, student: Student, parameters: list[nn.Parameter]) -> None:
        self.student, self.parameters = student, parameters

    @abstractmethod
    def predict(self, samples: Samples, embeds: PromptEmbeds) -> Outputs:
        """The outputs for `B` samples and the embeddings of a prompt for each, on the student's device."""


class Denoiser(Learner):
    """The denoiser as a whole. A sample is x_t as the denoiser is fed it ("inputs") and its timestep ("timesteps")."""

    evaluations: ClassVar[int] = 1
    part, answer, step = "training", "evaluation", "training step"

    def __init__(self, student: Student) -> None:
        super().__init__(student, student.parameters)

    def predict(self, samples: Samples, embeds: PromptEmbeds) -> Outputs:
        return {PREDICTION: self.student.predict(samples["inputs"], samples["timesteps"], embeds)}


class CrossAttention(Learner):
    """Each cross-attention layer with the feed-forward layer after it. A sample has hidden states for each of them."""

    evaluations: ClassVar[int] = 0
    part, answer, step = "layers", "layer answer", "layer step"

    def __init__(self, student: Student) -> None:
        names = student.family.cross_attention(student.denoiser)
        self.layers = {name: AttentionLayer(student.denoiser.get_submodule(name)) for name in names}
        super().__init__(student, [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad])

    def predict(self, samples: Samples, embeds: PromptEmbeds) -> Outputs:
        dtype = self.student.dtype
        tokens = embeds[TOKENS].to(dtype)
        with self.student.autocast():
            return {name: layer(samples[name].to(dtype), tokens) for name, layer in self.layers.items()}


class AttentionLayer(nn.Module):
    """A transformer block's cross-attention and the feed-forward layer after it: what they add to hidden states.

    Args:
        block: diffusers' `BasicTransformerBlock`, whose layers these stay.
    """

    norm2: nn.Module
    attn2: nn.Module
    norm3: nn.Module
    ff: nn.Module

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm2, self.attn2, self.norm3, self.ff = block.norm2, block.attn2, block.norm3, block.ff
        self.width: int = block.attn2.to_q.in_features

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the sum of both layers' outputs for hidden states `[B, positions, width]`, inputs of `norm2`, and tokens
        `[B, tokens, width of these]`."""
        attended = self.attn2(self.norm2(hidden), encoder_hidden_states=tokens)
        fed: Tensor = attended + self.ff(self.norm3(hidden + attended))
        return fed


class HiddenStates:
    """The hidden states that each layer is given while it is watched, `[samples, POSITIONS, width]` each, on the CPU."""

    def __init__(self, layers: dict[str, AttentionLayer], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.parts: list[Samples] = []  # one for each time

    @contextlib.contextmanager
    def watch(self, draws: torch.Generator) -> Iterator[None]:
        """Keep within it what the layers are given, at positions that depend on `draws`."""
        kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        places = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=draws)))

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
                hidden = given[0].detach()
                positions = send(torch.randint(hidden.shape[1], (POSITIONS,), generator=places), hidden.device)
                kept[name].append(fetch(hidden[:, positions]))

            return hook

        hooks = [layer.norm2.register_forward_pre_hook(keep(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        finish(self.device)  # what was fetched is there now
        self.parts.append({name: torch.cat(states) for name, states in kept.items()})


def pairs_of_samples(pairs: Tensor, side_by_side: int, samples: int) -> Tensor:
    """The pair of each sample of `HiddenStates`, `[samples]`.

    Samples come call by call, and in each call one prediction after the other of the trajectories that are denoised side by
    side.
    """
    return torch.cat([part.repeat(samples // len(pairs)) for part in pairs.split(side_by_side)])
