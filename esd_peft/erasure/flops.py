"""Work in FLOPs: samples that went through each network, times what one of them costs on the meta device.

To count operations in a run itself would slow each of them down. A fused attention that computes its scores again in the
backward pass is counted without that.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.family import TOKENS
from esd_peft.models.text_encoding import PROMPT, WHOLE, shortened
from esd_peft.options.training import StudentOptions
from esd_peft.runtime.memory_meter import UnreadValues
from esd_peft.training.learners import POSITIONS, AttentionLayer
from esd_peft.training.student import Student, make_student

META = torch.device("meta")
TERA = 1e12
CHECKS = ("diagnosis", "images")  # parts of the work that a run without images leaves out


class CallCosts:
    """FLOPs of one sample in each kind of call, by its name; measured when they are first asked for.

    Args:
        checkpointing: whether a training step computes its activations twice.
    """

    def __init__(self, family: ModelFamily, options: StudentOptions, checkpointing: bool = False) -> None:
        self.family, self.options, self.checkpointing = family, options, checkpointing
        self._calls: dict[str, Callable[[], float]] = {
            "evaluation": self._evaluation,
            "student evaluation": functools.partial(self._prediction, learns=False),
            "training step": functools.partial(self._prediction, learns=True),
            "layer answer": functools.partial(self._layers, learns=False),
            "layer step": functools.partial(self._layers, learns=True),
            "decoded image": self._decoding,
            "encoded image": self._encoding,
        }
        self._known: dict[str, float] = {}

    def __getitem__(self, call: str) -> float:
        """FLOPs of a sample; "prompt 10" is a prompt of which ten tokens are read, "prompt 0" a whole one."""
        if call not in self._known:
            _, is_prompt, length = call.partition(PROMPT)
            self._known[call] = self._prompt(int(length))[0] if is_prompt else self._calls[call]()
        return self._known[call]

    @functools.cached_property
    def _student(self) -> Student:
        denoiser = self.family.empty_denoiser().float()
        return make_student(self.family, denoiser, self.options, META, torch.float32)

    @functools.cached_property
    def _text_encoders(self) -> Any:
        return self.family.assemble(self.family.text_parts, torch.float32, empty=True)

    def _prompt(self, length: int) -> tuple[float, PromptEmbeds]:
        with shortened(self.family, self._text_encoders, length), torch.no_grad():
            return _flops(lambda: self.family.encode_prompts(self._text_encoders, ["a picture"], META))

    @functools.cached_property
    def _embeds(self) -> PromptEmbeds:
        return self._prompt(WHOLE)[1]

    @functools.cached_property
    def _latents(self) -> Tensor:
        return self.family.initial_latents(1, self._student.denoiser, torch.Generator()).to(META)

    def _of_predicting(self, learns: bool = False) -> float:
        denoiser, embeds, latents = self._student.denoiser, self._embeds, self._latents

        def run() -> None:
            prediction = self.family.predict(denoiser, latents, torch.zeros(1, device=META), embeds)
            if learns:
                self._learn(prediction)

        return _flops(run)[0]

    def _evaluation(self) -> float:
        with self._student.teacher(), torch.no_grad():
            return self._of_predicting()

    def _prediction(self, learns: bool) -> float:
        denoiser = self._student.denoiser
        if learns and self.checkpointing:
            denoiser.enable_gradient_checkpointing()
        with torch.set_grad_enabled(learns):
            flops = self._of_predicting(learns)
        if denoiser.is_gradient_checkpointing:
            denoiser.disable_gradient_checkpointing()
        return flops

    def _layers(self, learns: bool) -> float:
        """All cross-attention layers, at one sample's hidden states."""
        denoiser, tokens = self._student.denoiser, self._embeds[TOKENS]
        total = 0.0
        for name in self.family.cross_attention(denoiser):
            layer = AttentionLayer(denoiser.get_submodule(name))
            states = torch.empty(1, POSITIONS, layer.width, device=META)
            with contextlib.nullcontext() if learns else self._student.teacher(), torch.set_grad_enabled(learns):
                total += _flops(functools.partial(self._answer, layer, states, tokens))[0]
        return total

    def _answer(self, layer: AttentionLayer, states: Tensor, tokens: Tensor) -> None:
        self._learn(layer(states, tokens))

    def _learn(self, output: Tensor) -> None:
        if output.requires_grad:
            output.square().mean().backward()
        for parameter in self._student.parameters:
            parameter.grad = None

    @torch.no_grad()
    def _decoding(self) -> float:
        vae = self.family.empty_part("vae")
        latents = self.family.vae_latents(vae, self._latents)
        return _flops(lambda: vae.decode(latents, return_dict=False))[0]

    @torch.no_grad()
    def _encoding(self) -> float:
        vae = self.family.empty_part("vae")
        image = torch.empty(1, 3, *self.family.image_size(self._student.denoiser), device=META)
        return _flops(lambda: vae.encode(image, return_dict=False))[0]


def _flops(run: Callable[[], Any]) -> tuple[float, Any]:
    """FLOPs of `run` on the meta device, and what it returns."""
    with FlopCounterMode(display=False) as counter, UnreadValues():
        made = run()
    return float(counter.get_total_flops()), made


@dataclass(frozen=True)
class Work:
    """FLOPs of a run, by part."""

    parts: dict[str, float]  # of the erasure
    checks: dict[str, float]  # of what shows whether it worked
    evaluation: float  # of one sample in the denoiser

    @classmethod
    def of(cls, calls: Mapping[str, int], costs: CallCosts) -> "Work":
        """The work of so many samples by "part/call" (`PhaseProfiler.calls`)."""
        sums: dict[str, float] = {}
        for name, samples in calls.items():
            part, _, call = name.partition("/")
            sums[part] = sums.get(part, 0.0) + samples * costs[call]
        checks = {part: sums.pop(part) for part in CHECKS if part in sums}
        return cls(sums, checks, costs["evaluation"])

    def to_dict(self) -> dict[str, Any]:
        """For `result.json`: TFLOPs, and evaluations of the denoiser that are as much."""
        total = sum(self.parts.values())
        return {
            "tflops": {part: flops / TERA for part, flops in self.parts.items()},
            "total_tflops": total / TERA,
            "denoiser_evaluations_worth": round(total / self.evaluation),
            "tflops_of_an_evaluation": self.evaluation / TERA,
            "checks_tflops": {part: flops / TERA for part, flops in self.checks.items()},
        }


def work_line(work: dict[str, Any]) -> str:
    """`Work.to_dict` in one line, the largest part first."""
    parts, total = sorted(work["tflops"].items(), key=lambda item: -item[1]), work["total_tflops"]
    shares = ", ".join(f"{part} {tflops / total:.0%}".replace("%", " %") for part, tflops in parts if total)
    line = f"work  {_tflops(total)} (as much as {work['denoiser_evaluations_worth']:,} denoiser evaluations): {shares}"
    checks = sum(work["checks_tflops"].values())
    named = " and ".join(work["checks_tflops"])
    return line + (f"; beside it {named}: {_tflops(checks)}" if checks else "")


def _tflops(amount: float) -> str:
    return f"{amount:,.1f} TFLOPs" if amount >= 1 else f"{1000 * amount:,.3g} GFLOPs"
