"""A cross-attention layer with the feed-forward layer after it, by itself: what it is given, and what it is to add to it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esd_kernels import guided_mse
from esd_peft.models.family import TOKENS
from esd_peft.prompts.wordings import Wordings
from esd_peft.training.mixture import HOLD_WEIGHT, MixedPrompts
from esd_peft.training.student import Student

POSITIONS = 8  # of a layer's hidden states are kept of each sample: attention answers each by itself
ERASE, HOLD = 16, 16  # prompts in a step


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
        """Of hidden states `[B, positions, width]`, as `norm2` is given them, and tokens `[B, tokens, width of these]`."""
        attended = self.attn2(self.norm2(hidden), encoder_hidden_states=tokens)
        fed: Tensor = attended + self.ff(self.norm3(hidden + attended))
        return fed


class LayerStates:
    """What each layer is given while it is watched, `[samples, POSITIONS, width]`, on the CPU: a dict each time."""

    def __init__(self, layers: dict[str, AttentionLayer]) -> None:
        self.layers = layers
        self.parts: list[dict[str, Tensor]] = []

    @contextlib.contextmanager
    def watch(self, draws: torch.Generator) -> Iterator[None]:
        """Within it what the layers are given is kept, at positions that depend on `draws`."""
        kept: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        places = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=draws)))

        def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(layer: nn.Module, given: tuple[Any, ...]) -> None:
                positions = torch.randint(given[0].shape[1], (POSITIONS,), generator=places).to(given[0].device)
                kept[name].append(given[0].detach()[:, positions].cpu())

            return hook

        hooks = [layer.norm2.register_forward_pre_hook(keep(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.parts.append({name: torch.cat(states) for name, states in kept.items()})


def pairs_of_samples(pairs: Tensor, side_by_side: int, samples: int) -> Tensor:
    """Of which pair each sample of `LayerStates` is, `[samples]`: these come call by call, and in each a prediction after
    the other of the trajectories that are denoised side by side."""
    return torch.cat([part.repeat(samples // len(pairs)) for part in pairs.split(side_by_side)])


class LayerLoss:
    """The layers' mean squared errors for a batch, each as a share of what the concept does in that layer.

    Args:
        hidden: of each layer what it is given, `[samples, POSITIONS, width]`.
        shown: of each sample the concept along whose trajectory it lies, `[samples]` int64; −1: none.
        unprompted_guidance: η of prompts that hold, at samples of a concept.
    """

    def __init__(
        self,
        student: Student,
        layers: dict[str, AttentionLayer],
        hidden: dict[str, Tensor],
        shown: Tensor,
        wordings: Wordings,
        draws: torch.Generator,
        unprompted_guidance: float = 0.0,
    ) -> None:
        self.student, self.layers, self.hidden, self.shown, self.draws = student, layers, hidden, shown, draws
        self.tokens, self.unprompted_guidance = wordings.embeds[TOKENS], unprompted_guidance
        plain = [pairs[0] for pairs in wordings.plain]
        self.named, self.neutral = wordings.index(p.prompt for p in plain), wordings.index(p.neutral for p in plain)
        self.parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
        self.sizes: dict[str, Tensor] = {}

    def __call__(self, batch: MixedPrompts) -> Tensor:
        student, device, count = self.student, self.student.device, len(batch.prompts)
        samples = torch.randint(len(self.shown), (count,), generator=self.draws)
        everywhere, shown = torch.arange(count), self.shown[samples]
        pushed = everywhere[ERASE:][shown[ERASE:] >= 0] if self.unprompted_guidance else everywhere[:0]
        mapped = batch.are_mapped
        # what the teacher is asked: rows of embeddings, and of which sample of the batch
        erasing = everywhere[:ERASE]
        asked = {"named": (batch.prompts, everywhere), "null": (batch.neutrals[erasing], erasing)}
        asked |= {"goal": (batch.goals[erasing], erasing)} if mapped else {}
        asked |= {"shown": (self.named[shown[pushed]], pushed), "less": (self.neutral[shown[pushed]], pushed)}
        rows, where = (torch.cat(column) for column in zip(*asked.values(), strict=True))
        states = {name: self.hidden[name][samples].to(device, student.dtype) for name in self.layers}
        tokens, where = self.tokens[rows].to(device, student.dtype), where.to(device)
        with torch.no_grad(), student.teacher():
            taught = self._outputs({name: x[where] for name, x in states.items()}, tokens)
        made = self._outputs(states, tokens[:count])
        eta, weight = batch.eta.clone(), batch.weight.clone()
        eta[pushed], weight[ERASE:] = self.unprompted_guidance, HOLD_WEIGHT * weight[ERASE:]
        eta, weight, pushed = eta.to(device), weight.to(device), pushed.to(device)
        total = torch.zeros((), device=device)
        for name, output in made.items():
            parts = taught[name].split([len(at) for _, at in asked.values()])
            answer = dict(zip(asked, parts, strict=True))
            named, held = answer["named"], answer["named"][ERASE:]
            null = torch.cat([answer["null"], held])
            goal = torch.cat([answer["goal"], held]) if mapped else null
            if name not in self.sizes:
                self.sizes[name] = (named - null)[:ERASE].float().square().mean()
            if len(pushed):
                named, null = named.index_copy(0, pushed, answer["shown"]), null.index_copy(0, pushed, answer["less"])
            total = total + guided_mse(output, torch.cat([null, named]), eta, goal, weight / self.sizes[name])
        return total / len(self.layers)

    def _outputs(self, states: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
        with self.student.autocast():
            return {name: layer(states[name], tokens) for name, layer in self.layers.items()}
