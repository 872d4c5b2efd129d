"""What learns: scopes turned into PEFT adapters, or into the base weights themselves; how it is saved.

One denoiser serves teacher and student: the teacher is the student with its adapter disabled.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from esd_peft.config import SCOPES, EraseConfig
from esd_peft.errors import UserError
from esd_peft.models import Backbone
from esd_peft.runtime.seeds import seed_for
from esd_peft.training.closed_form import factors
from esd_peft.training.prompt_maps import PromptMaps

WEIGHTS_FILE = "denoiser_weights.safetensors"  # of --adapter none: the new values under the denoiser's own names


def scope_modules(backbone: Backbone, denoiser: ModelMixin, scope: str) -> list[str]:
    """Names of the Linear and Conv2d layers in `scope`. Raises `UserError` if there are none.

    Grouped convolutions, such as Sana's depthwise ones, are left out: PEFT adapts none whose groups do not divide the rank,
    and a depthwise kernel of 3x3 has fewer weights than its factors would have.
    """
    layers = [(name, module) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return _select(backbone, scope, [name for name, module in layers if getattr(module, "groups", 1) == 1])


def scope_parameters(backbone: Backbone, denoiser: ModelMixin, scope: str) -> list[str]:
    """Names of the parameters in `scope`. Raises `UserError` if there are none."""
    return _select(backbone, scope, [name for name, _ in denoiser.named_parameters()])


def _select(backbone: Backbone, scope: str, names: list[str]) -> list[str]:
    chosen = [name for name in names if backbone.in_scope(scope, name)]
    if not chosen:
        others = [s for s in SCOPES if any(backbone.in_scope(s, name) for name in names)]
        raise UserError(f"--scope {scope} selects nothing in this model; these select something: {', '.join(others)}")
    return chosen


class Student(ABC):
    """A denoiser with something to train in it."""

    denoiser: ModelMixin
    parameters: list[nn.Parameter]  # fp32

    @abstractmethod
    def teacher(self) -> contextlib.AbstractContextManager[None]:
        """Within it, the denoiser is the frozen base."""

    @abstractmethod
    def start_from(self, changes: PromptMaps) -> None:
        """Let each layer W that reads prompt embeddings start as W + W D, D being their change (`closed_form`).

        To be called, with an empty dict if there is none, once weights and projections are where they are trained: it
        projects what was drawn at random too.
        """

    @abstractmethod
    def project(self) -> None:
        """Take out of what was learned all that acts on protected embeddings; to be called after each step."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what was learned."""


def make_student(
    backbone: Backbone, denoiser: ModelMixin, config: EraseConfig, projections: PromptMaps | None = None
) -> Student:
    """Make the config's scope of `denoiser` trainable, in place. Raises `UserError` if the scope selects nothing.

    `projections` keep layers that read the prompt off the protected embeddings (`esd_peft.training.nullspace`): their
    change is ΔW P. A LoRA's ΔW = B A takes it into A; LoHa and LoKr have no such factor and go without.
    """
    if config.adapter == "none":
        names = scope_parameters(backbone, denoiser, config.learning_scope)
        return _WeightsStudent(backbone, denoiser, names, projections or {})
    layers = scope_modules(backbone, denoiser, config.learning_scope)
    return _AdapterStudent(backbone, denoiser, layers, config, projections or {})


class _AdapterStudent(Student):
    def __init__(
        self,
        backbone: Backbone,
        denoiser: ModelMixin,
        targets: list[str],
        config: EraseConfig,
        projections: PromptMaps,
    ) -> None:
        self.backbone, self.denoiser = backbone, denoiser
        rank = config.adapter_rank
        alpha = rank if config.alpha is None else config.alpha
        sizes = {"r": rank, "target_modules": targets}
        made: peft.PeftConfig = {
            "lora": lambda: peft.LoraConfig(lora_alpha=alpha, **sizes),
            "loha": lambda: peft.LoHaConfig(alpha=alpha, **sizes),
            "lokr": lambda: peft.LoKrConfig(alpha=alpha, **sizes),
        }[config.adapter]()
        with torch.random.fork_rng(devices=[]):  # peft draws the initial weights from the global generator
            torch.manual_seed(seed_for(config.seed, "adapter"))
            self.peft = peft.get_peft_model(denoiser, made)
        compute_in_inputs_dtype(denoiser)
        # where the base lies here is nobody's business: `base.json` has it
        self.peft.peft_config["default"].base_model_name_or_path = None
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self._projected = [
            (parameter, projections[kind])
            for name, parameter in denoiser.named_parameters()
            if "lora_A" in name and (kind := backbone.prompt_input(name)) in projections
        ]

    @torch.no_grad()
    def start_from(self, changes: PromptMaps) -> None:
        for name, layer in self.denoiser.named_modules():
            if isinstance(layer, LoraLayer) and (kind := self.backbone.prompt_input(name)) in changes:
                base = layer.base_layer
                rows = changes[kind].T.to(base.weight.dtype if base.weight.dtype.is_floating_point else torch.float32)
                product = (base(rows) - base(torch.zeros_like(rows))).T  # W D, in however few bits W is stored
                up, down = factors(product.float() / layer.scaling["default"], layer.r["default"])
                layer.lora_B["default"].weight.copy_(up)
                layer.lora_A["default"].weight.copy_(down)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        for down, projection in self._projected:
            down.copy_(down @ projection)

    def teacher(self) -> contextlib.AbstractContextManager[None]:
        return self.peft.disable_adapter()

    def save(self, directory: Path) -> None:
        """PEFT's own files; for LoRA also the one file that diffusers' `load_lora_weights` reads.

        That file acts as trained at strength 1 in whatever reads it: α/r is in its weights, because ComfyUI, Invoke and
        diffusers before 0.35 know nothing of the metadata in which α would be.
        """
        self.peft.save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # peft's card, which is empty
        config = self.peft.peft_config["default"]
        if config.peft_type == peft.PeftType.LORA:
            layers = peft.get_peft_model_state_dict(self.peft, save_embedding_layers=False)
            scale = config.lora_alpha / config.r
            layers = {
                name.removeprefix("base_model.model."): value.cpu() * (scale if "lora_B" in name else 1)
                for name, value in layers.items()
            }
            self.backbone.save_lora(directory, layers, config.to_dict() | {"lora_alpha": config.r})


def compute_in_inputs_dtype(denoiser: ModelMixin) -> None:
    """LoRA's factors stay in fp32, where small steps are not rounded away, and are cast for each product.

    peft would cast a layer's activations to fp32 instead, multiply there, and cast back; they are much larger.
    """
    for layer in denoiser.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.forward = functools.partial(_product, factor)


def _product(factor: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    weight = factor.weight.to(x.dtype)
    return nn.functional.linear(x, weight) if isinstance(factor, nn.Linear) else factor._conv_forward(x, weight, None)


class _WeightsStudent(Student):
    """`--adapter none`. The denoiser holds fp32 master weights; a copy of the scoped ones stands by as the teacher's."""

    def __init__(self, backbone: Backbone, denoiser: ModelMixin, names: list[str], projections: PromptMaps) -> None:
        self.backbone, self.denoiser, self.names = backbone, denoiser, names
        everything = dict(denoiser.named_parameters())
        self.parameters = [everything[name].requires_grad_() for name in names]
        self._frozen = [p.detach().clone() for p in self.parameters]
        self._projected = [
            (parameter, frozen, projections[kind])
            for name, parameter, frozen in zip(names, self.parameters, self._frozen, strict=True)
            if parameter.dim() == 2 and (kind := backbone.prompt_input(name)) in projections
        ]

    @torch.no_grad()
    def start_from(self, changes: PromptMaps) -> None:
        for name, weight in zip(self.names, self.parameters, strict=True):
            if weight.dim() == 2 and (kind := self.backbone.prompt_input(name)) in changes:
                weight.add_(weight @ changes[kind])

    @torch.no_grad()
    def project(self) -> None:
        for weight, frozen, projection in self._projected:
            weight.copy_(frozen + (weight - frozen) @ projection)

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        learned: list[Tensor] = [p.data for p in self.parameters]
        self._put(self._frozen)
        try:
            yield
        finally:
            self._put(learned)

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def save(self, directory: Path) -> None:
        learned = zip(self.names, self.parameters, strict=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in learned}, directory / WEIGHTS_FILE)
