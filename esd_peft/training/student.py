"""Students: scopes turned into PEFT adapters, or into the base weights themselves; their predictions and files.

One denoiser serves teacher and student: the teacher is the student with its adapter disabled.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

import peft
import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from esd_peft.adapters.saved import WEIGHTS_FILE
from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.family import index_embeds
from esd_peft.models.offload import offload_base
from esd_peft.models.quantize import load_quantized
from esd_peft.options.memory import MemoryOptions
from esd_peft.options.training import StudentOptions
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime.devices import exact, place
from esd_peft.runtime.seeds import seed_for
from esd_peft.training.buffer import Buffer
from esd_peft.training.closed_form import PromptMaps, factors, prompt_maps


class Student(ABC):
    """A denoiser with something to train in it, which computes on `device` in `dtype`."""

    mixed_precision = False  # the weights themselves are in fp32, whatever the denoiser computes in

    def __init__(self, family: ModelFamily, denoiser: ModelMixin, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.denoiser, self.device, self.dtype = family, denoiser, device, dtype
        self.parameters: list[nn.Parameter] = []  # what learns, in fp32

    def predict(self, inputs: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        """The denoiser's prediction `[B, ...]` as it is now, for scaled latents `[B, ...]` and timesteps `[B]`."""
        with self.autocast():
            return self.family.predict(self.denoiser, inputs.to(self.dtype), timesteps, embeds)

    def predict_each(self, sample: Buffer, embeds: PromptEmbeds, batch_size: int) -> Tensor:
        """Predictions at one x_t, `sample`, with each of several prompts, of which `embeds` are in host memory: `[prompts,
        elements]` on the device in fp32, so many prompts at a time."""
        made = []
        for part in torch.arange(len(next(iter(embeds.values())))).split(batch_size):
            some = {name: value.to(self.device) for name, value in index_embeds(embeds, part).items()}
            inputs = sample.inputs.expand(len(part), *sample.inputs.shape[1:])
            made.append(self.predict(inputs, sample.timesteps.expand(len(part)), some).float().flatten(1))
        return torch.cat(made)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision where the weights themselves learn, in fp32, and the denoiser is to compute in half precision.

        Under an adapter the denoiser is in `dtype` as a whole, normalisation included, as plain diffusers runs it; the
        adapter in it is in fp32 and is cast for its products (`compute_in_inputs_dtype`). Autocast would copy activations
        to fp32 and back around every normalisation (what that costs: docs/speed.md).
        """
        enabled = self.mixed_precision and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    @torch.no_grad()
    def take(self, learned: Iterable[Tensor]) -> None:
        """Become what has learned that, in the order of `parameters`. Raises `ValueError` or `RuntimeError` if it is not
        alike."""
        for parameter, value in zip(self.parameters, learned, strict=True):
            parameter.copy_(value)

    @abstractmethod
    def teacher(self) -> contextlib.AbstractContextManager[None]:
        """Make the denoiser the frozen base inside the block."""

    @abstractmethod
    def scaled(self, strength: float) -> contextlib.AbstractContextManager[None]:
        """Scale what was learned inside the block: 0 is the base, 1 the student as it is."""

    @abstractmethod
    def start_from(self, changes: PromptMaps) -> None:
        """Start each layer W that reads prompt embeddings as W + W D, D being their change (`closed_form`).

        To be called, with an empty dict if there is none, once weights and projections are where they are trained: it
        projects what was drawn at random too.
        """

    @abstractmethod
    def project(self) -> None:
        """Take out of what was learned all that acts on the retain set's embeddings; to be called after each step."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write what was learned."""


def load_student(
    family: ModelFamily,
    options: StudentOptions,
    memory: MemoryOptions,
    prompts: PromptPlan,
    embeds: PromptEmbeds,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
) -> Student:
    """The denoiser on the device, what learns in it, and what that starts from. `embeds` are those of `prompts.texts`."""
    if memory.quantize != "none":
        denoiser = load_quantized(family, memory.quantize, dtype, device)
    else:  # the weights themselves learn in fp32; under an adapter they are only read
        denoiser = family.load_denoiser(torch.float32 if options.adapter_type == "none" else dtype)
    if not memory.offload:
        place(denoiser, device)
    here = {name: exact(value.to(denoiser.device)) for name, value in embeds.items()}
    maps = prompt_maps(options, prompts, family, denoiser, here)
    projections, changes = ({kind: value.to(device) for kind, value in found.items()} for found in maps)
    student = make_student(family, denoiser, options, device, dtype, seed, projections)
    if memory.offload:
        offload_base(denoiser, device)
    student.start_from(changes)
    return student


def make_student(
    family: ModelFamily,
    denoiser: ModelMixin,
    options: StudentOptions,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    projections: PromptMaps | None = None,
) -> Student:
    """Make the scope of `denoiser` trainable, in place. Raises `UserError` if the scope selects nothing.

    `projections` keep layers that read the prompt off the retain set's embeddings (`closed_form`): their change is ΔW P. A
    LoRA's ΔW = B A takes it into A; LoHa and LoKr have no such factor and go without.
    """
    if options.adapter_type == "none":
        return _WeightsStudent(family, denoiser, options, device, dtype, projections or {})
    return _AdapterStudent(family, denoiser, options, device, dtype, seed, projections or {})


class _AdapterStudent(Student):
    def __init__(
        self,
        family: ModelFamily,
        denoiser: ModelMixin,
        options: StudentOptions,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        projections: PromptMaps,
    ) -> None:
        super().__init__(family, denoiser, device, dtype)
        sizes = {"r": options.rank, "target_modules": family.scope_modules(denoiser, options.scope)}
        made: peft.PeftConfig = {
            "lora": lambda: peft.LoraConfig(lora_alpha=options.alpha, **sizes),
            "loha": lambda: peft.LoHaConfig(alpha=options.alpha, **sizes),
            "lokr": lambda: peft.LoKrConfig(alpha=options.alpha, **sizes),
        }[options.adapter_type]()
        with torch.random.fork_rng(devices=[]):  # peft draws the initial weights from the global generator
            torch.manual_seed(seed_for(seed, "adapter"))
            self.peft = peft.get_peft_model(denoiser, made)
        compute_in_inputs_dtype(denoiser)
        # where the base lies here is nobody's business: `base.json` has it
        self.peft.peft_config["default"].base_model_name_or_path = None
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self._projected = [
            (parameter, projections[kind])
            for name, parameter in denoiser.named_parameters()
            if "lora_A" in name and (kind := family.prompt_input(name)) in projections
        ]

    @torch.no_grad()
    def start_from(self, changes: PromptMaps) -> None:
        for name, layer in self.denoiser.named_modules():
            if isinstance(layer, LoraLayer) and (kind := self.family.prompt_input(name)) in changes:
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

    @contextlib.contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        layers = [layer for layer in self.denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        scales = [layer.scaling["default"] for layer in layers]
        try:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling["default"] = strength * scale
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling["default"] = scale

    def save(self, directory: Path) -> None:
        """PEFT's own files; for LoRA also the one file that diffusers' `load_lora_weights` reads.

        That file acts as trained at strength 1 in whatever reads it: α/r is in its weights, because ComfyUI, Invoke and
        diffusers before 0.35 know nothing of the metadata in which α would be.
        """
        config = self.peft.peft_config["default"]
        for name, value in vars(config).items():
            if isinstance(value, set):  # which has another order in each process: the same run makes the same files
                setattr(config, name, sorted(value))
        self.peft.save_pretrained(directory, save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # peft's card, which is empty
        if config.peft_type == peft.PeftType.LORA:
            layers = peft.get_peft_model_state_dict(self.peft, save_embedding_layers=False)
            scale = config.lora_alpha / config.r
            layers = {
                name.removeprefix("base_model.model."): value.cpu() * (scale if "lora_B" in name else 1)
                for name, value in layers.items()
            }
            self.family.save_lora(directory, layers, config.to_dict() | {"lora_alpha": config.r})


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
    """`--adapter-type none`. The denoiser holds fp32 weights; a copy of the scoped ones stands by as the teacher's."""

    mixed_precision = True

    def __init__(
        self,
        family: ModelFamily,
        denoiser: ModelMixin,
        options: StudentOptions,
        device: torch.device,
        dtype: torch.dtype,
        projections: PromptMaps,
    ) -> None:
        super().__init__(family, denoiser, device, dtype)
        names = self.names = family.scope_parameters(denoiser, options.scope)
        everything = dict(denoiser.named_parameters())
        self.parameters = [everything[name].requires_grad_() for name in names]
        self._frozen = [p.detach().clone() for p in self.parameters]
        self._projected = [
            (parameter, frozen, projections[kind])
            for name, parameter, frozen in zip(names, self.parameters, self._frozen, strict=True)
            if parameter.dim() == 2 and (kind := family.prompt_input(name)) in projections
        ]

    @torch.no_grad()
    def start_from(self, changes: PromptMaps) -> None:
        for name, weight in zip(self.names, self.parameters, strict=True):
            if weight.dim() == 2 and (kind := self.family.prompt_input(name)) in changes:
                weight.add_(weight @ changes[kind])

    @torch.no_grad()
    def project(self) -> None:
        for weight, frozen, projection in self._projected:
            weight.copy_(frozen + (weight - frozen) @ projection)

    def teacher(self) -> contextlib.AbstractContextManager[None]:
        return self._holding(self._frozen)

    def scaled(self, strength: float) -> contextlib.AbstractContextManager[None]:
        pairs = zip(self._frozen, self.parameters, strict=True)
        return self._holding([frozen + strength * (p.detach() - frozen) for frozen, p in pairs])

    @contextlib.contextmanager
    def _holding(self, values: list[Tensor]) -> Iterator[None]:
        learned: list[Tensor] = [p.data for p in self.parameters]
        self._put(values)
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
