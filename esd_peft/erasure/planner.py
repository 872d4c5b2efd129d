"""Plans of a run before it starts: memory by phase, NFE, the buffer's size, and settings that fit a budget."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from diffusers import ModelMixin
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.compilation import repeated_blocks
from esd_peft.models.family import TOKENS
from esd_peft.models.offload import encoder_bytes
from esd_peft.models.prompt_reader import ENCODE_BATCH
from esd_peft.options.base import parse_bytes
from esd_peft.options.erase import EraseConfig
from esd_peft.options.runtime import RuntimeOptions
from esd_peft.options.training import BY_PROMPTS, BufferOptions
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime.devices import IMAGINED, is_accelerator, usable_memory
from esd_peft.runtime.memory_meter import track_memory, weight_bytes
from esd_peft.training.learners import POSITIONS, AttentionLayer
from esd_peft.training.student import make_student
from esd_peft.training.work import buffer_shape, count_nfe, probe_trajectories

META = torch.device("meta")
GIB = 2**30
HEADROOM = 0.92  # of a budget is planned for: allocators round up and leave gaps
WHEN = {  # the phases, in words
    "encode": "while prompts are encoded",
    "load": "while the denoiser is loaded",
    "rollout": "in the rollout",
    "train": "in training",
    "evaluate": "while validation images are made",
}
Settings = dict[str, object]  # options by name
# the options that a budget decides, where they are not given
MEMORY_SETTINGS = ("per_device_batch_size", "rollout_batch_size", "gradient_checkpointing", "quantize", "offload", "compile")


@dataclass
class MemoryPlan:
    """Predicted memory for the settings of `config`, in bytes of device memory without the driver's own."""

    config: EraseConfig
    phases: dict[str, int]
    buffer_bytes: int  # in host memory
    nfe: int

    @property
    def peak(self) -> int:
        """The memory of the largest phase."""
        return self.phases[self.largest]

    @property
    def largest(self) -> str:
        """The name of that phase."""
        return max(self.phases, key=self.phases.__getitem__)


def make_plan(given: EraseConfig, resolved: EraseConfig, prompts: PromptPlan, family: ModelFamily) -> MemoryPlan:
    """The plan for `resolved` on the device it names, with the settings that fit its budget; what `given`, the config as it
    came, sets itself stays.

    With `--device auto` on a machine without a GPU the plan is for one of 12 GiB. Raises `UserError` if nothing fits.
    """
    if resolved.training.method == "contrastive":
        raise UserError("--plan and --memory-budget do not work with --method contrastive; leave them out")
    device, on_this_machine = resolved.runtime.torch_device, resolved
    resolved = imagined(given.runtime, resolved)
    budget = parse_bytes(resolved.memory.memory_budget) if resolved.memory.memory_budget != "auto" else None
    if budget is None and is_accelerator(device):
        budget = usable_memory(device)
    elif budget is None and resolved is not on_this_machine:
        budget = 12 * GIB
    estimator = MemoryEstimator(resolved, prompts, family)
    return estimator.plan(resolved) if budget is None else fit(estimator, given, resolved, budget)


def imagined(given: RuntimeOptions, resolved: EraseConfig) -> EraseConfig:
    """Return the config as a GPU would run it, if `--device auto` finds none; otherwise unchanged."""
    if resolved.runtime.torch_device.type != "cpu" or given.device != "auto":
        return resolved
    return resolved.replace(device=IMAGINED, dtype="bfloat16" if given.dtype == "auto" else given.dtype)


def given_settings(given: EraseConfig) -> set[str]:
    """Return the `MEMORY_SETTINGS` that the config sets itself."""
    return {
        name
        for group in (given.memory, given.buffer, given.runtime)
        for name, field in type(group).model_fields.items()
        if name in MEMORY_SETTINGS and getattr(group, name) != field.default
    }


def within_budget(given: EraseConfig, resolved: EraseConfig, prompts: PromptPlan, family: ModelFamily) -> EraseConfig:
    """`resolved` with the settings that fit its budget; says which, where they are not those it came with."""
    on_gpu = is_accelerator(resolved.runtime.torch_device)
    if resolved.memory.memory_budget == "auto" and (not on_gpu or resolved.training.method == "contrastive"):
        return resolved
    planned = make_plan(given.replace(device=resolved.runtime.device), resolved, prompts, family).config
    if planned != resolved:
        print(f"to stay within the memory budget: {describe(planned)}")
    return planned


class MemoryEstimator:
    """Measurements on the meta device from which plans of one model and one set of prompts are made."""

    def __init__(self, config: EraseConfig, prompts: PromptPlan, family: ModelFamily) -> None:
        self.family, self.prompts = family, prompts
        self.dtype = config.runtime.torch_dtype
        self.encoders, embeds = self._encoding()
        self.embeds = sum(value.numel() * value.element_size() for value in embeds.values()) * len(self.prompts.texts)
        self.width = max(value.shape[-1] for value in embeds.values())
        denoiser = family.empty_denoiser().to(torch.float32 if config.student.adapter_type == "none" else self.dtype)
        self.bases = {how: weight_bytes(denoiser, how) for how in ("none", "int8", "nf4")}
        self.block = max(map(weight_bytes, repeated_blocks(denoiser)))
        noise = family.initial_latents(1, denoiser, torch.Generator())
        self.latents = noise.numel()
        self.drawing = self._decoding(noise)
        student = make_student(family, denoiser, config.student, META, self.dtype)
        learning = sum(p.numel() for p in student.parameters) * 4
        # two moments, in 8 bits a quarter of their size; and the adapter, or the teacher's copy of the weights
        self.learning = int(learning * (1 + (0.5 if "8bit" in config.training.optimizer else 2)))
        if denoiser.dtype != self.dtype:  # autocast keeps a copy of each weight for the backward pass
            self.learning += sum(p.numel() for p in denoiser.parameters()) * self.dtype.itemsize
        on_gpu = is_accelerator(config.runtime.torch_device)
        self._work = functools.partial(_activations, family, denoiser, noise, embeds, on_gpu)
        self._attend = functools.partial(_attention_activations, family, denoiser, embeds)
        self.running = [self._work(count) for count in (1, 2)]

    @functools.cache  # noqa: B019 (an estimator lives as long as its planning)
    def training(self, checkpointing: bool) -> list[int]:
        """Bytes that a training step of one sample, and of two, needs besides weights."""
        return [self._work(count, learns=True, checkpointing=checkpointing) for count in (1, 2)]

    @functools.cache  # noqa: B019
    def attending(self) -> list[int]:
        """Bytes that a training step of cross-attention needs besides weights, for one sample and for two."""
        return [self._attend(count) for count in (1, 2)]

    def _encoding(self) -> tuple[int, PromptEmbeds]:
        """Bytes of the text encoders and what they need at work, layer by layer where they are large; the embeddings of one
        prompt."""
        pipe = self.family.assemble(self.family.text_parts, self.dtype, empty=True)
        encoders = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        with track_memory(*encoders) as meter, torch.no_grad():
            embeds = self.family.encode_prompts(pipe, ["a picture"] * min(ENCODE_BATCH, len(self.prompts.texts)), META)
        there = encoder_bytes(pipe)
        one = {name: value[:1].clone() for name, value in embeds.items()}
        return there + meter.peak, one

    def _decoding(self, latents: Tensor) -> int:
        """Bytes of the VAE and what it needs to draw one image."""
        dtype = self.family.decoding_dtype(self.dtype)
        vae = self.family.empty_part("vae", dtype)
        with track_memory(vae) as meter, torch.no_grad():
            vae.decode(self.family.vae_latents(vae, latents.to(META, dtype)), return_dict=False)
        return weight_bytes(vae) + meter.peak

    def plan(self, config: EraseConfig) -> MemoryPlan:
        """Make the plan of a resolved config that differs in settings only."""
        predictions, method = self.prompts.predictions, config.training.method
        buffer, training, memory = config.buffer, config.training, config.memory
        seeds, steps = config.validation.num_validation_images, buffer.num_inference_steps
        weights = self.block if memory.offload else self.bases[memory.quantize]
        working = weights + self.learning + self.embeds
        if method in BY_PROMPTS:
            trajectories, keep = probe_trajectories(len(self.prompts.concepts)), steps
            # candidates for synonyms are probed twice as many at a time
            together = max(predictions * min(buffer.rollout_batch_size, trajectories), 2 * buffer.rollout_batch_size)
        elif method == "contrastive":  # which has no trajectories
            trajectories = keep = together = steps = 0
        else:
            shape = buffer_shape(buffer, training, len(self.prompts.preserve))
            trajectories, keep = shape.trajectories, shape.keep or steps
            together = predictions * min(buffer.rollout_batch_size, trajectories)
        phases = {
            "encode": self.encoders,
            # null space and closed form: copies of the embeddings, and squares of their width in fp64
            "load": weights + 3 * self.embeds + 6 * 8 * self.width**2,
        }
        if training.max_train_steps:
            phases["rollout"] = working + _line(self.running, together)
            stepping = self.attending() if method == "layers" else self.training(memory.gradient_checkpointing)
            step = _line(stepping, memory.per_device_batch_size)
            if method == "denoiser":  # between steps the teacher is asked, as many at a time as in a rollout at most
                asked = min(2 * buffer.rollout_batch_size, predictions * training.train_batch_size)
                step = max(step, _line(self.running, asked))
            phases["train"] = working + step
        if seeds:
            looked_at = max(len(self.prompts.concepts) + 3, len(config.validation.validation_prompt))
            images = min(buffer.rollout_batch_size, seeds * looked_at)
            phases["evaluate"] = working + max(self.drawing, _line(self.running, 2 * images))
        samples = trajectories * min(steps, keep) if training.max_train_steps else 0
        return MemoryPlan(
            config, phases, samples * self.latents * (1 + predictions) * self.dtype.itemsize, self._nfe(config)
        )

    def _nfe(self, config: EraseConfig) -> int:
        """Return the NFE of the whole run."""
        return count_nfe(config.buffer, config.training, config.memory.gradient_checkpointing, self.prompts)


def fit(estimator: MemoryEstimator, given: EraseConfig, resolved: EraseConfig, budget: int) -> MemoryPlan:
    """The cheapest settings whose predicted peak is within `budget` bytes. Raises `UserError` if none is.

    In this order: all of a batch at once, then smaller and smaller micro-batches, then these with gradient checkpointing,
    then all of it again with the base in NF4, and at last with the base offloaded to the CPU. What `given` sets itself
    stays.
    """
    plans = []
    for settings in _settings(given, resolved.training.train_batch_size):
        plans.append(estimator.plan(resolved.replace(**settings)))
        if plans[-1].peak <= HEADROOM * budget:
            return plans[-1]
    best = min(plans, key=lambda plan: plan.peak)
    missing = best.peak / HEADROOM - budget
    raise UserError(
        f"--memory-budget {amount(budget)} is {amount(missing)} short: {amount(best.peak)} {WHEN[best.largest]}, and "
        f"{1 - HEADROOM:.0%} left free, even with {describe(best.config)}; give more, or take a smaller model"
    )


def smaller(estimator: MemoryEstimator, given: EraseConfig, used: EraseConfig, phase: str) -> EraseConfig | None:
    """The next settings after those of `used`, in the order of `fit`, with which `phase` takes less; none if there are none.

    Nothing is taken back for it, and no other phase takes more. What `given`, the config as it came, sets itself stays.
    """
    now = estimator.plan(used).phases
    for settings in _settings(given, used.training.train_batch_size):
        plan = estimator.plan(used.replace(**settings))
        back = any(new > old for new, old in zip(_at_once(plan.config), _at_once(used), strict=True))
        more = any(size > now[name] for name, size in plan.phases.items())
        if not back and not more and plan.phases.get(phase, 0) < now.get(phase, 0):
            return plan.config
    return None


def _at_once(config: EraseConfig) -> tuple[int, int, bool]:
    """Numbers that are on the device together: samples, trajectories, and a sample's activations."""
    memory = config.memory
    return memory.per_device_batch_size, config.buffer.rollout_batch_size, not memory.gradient_checkpointing


def _settings(given: EraseConfig, batch_size: int) -> Iterator[Settings]:
    adapter_type, memory = given.student.adapter_type, given.memory
    bases: list[Settings] = [{"quantize": memory.quantize, "offload": memory.offload}]
    offloadable = adapter_type != "none" and given.runtime.compile != "on"
    if memory.quantize == "none" and not memory.offload:
        bases += [bases[0] | {"quantize": "nf4"}] if adapter_type == "lora" and find_spec("bitsandbytes") else []
        bases += [bases[0] | {"offload": True, "gradient_checkpointing": True, "compile": "off"}] if offloadable else []
    default = BufferOptions.model_fields["rollout_batch_size"].default
    side_by_side = given.buffer.rollout_batch_size
    rollouts = _halves(default) if side_by_side == default else [side_by_side]
    fixed = memory.per_device_batch_size
    for base in bases:
        for checkpointing in sorted({memory.gradient_checkpointing or memory.offload, True}):
            for samples in [fixed] if fixed else _divisors(batch_size):
                for trajectories in rollouts:
                    yield {
                        "gradient_checkpointing": checkpointing,
                        "per_device_batch_size": samples,
                        "rollout_batch_size": trajectories,
                    } | base


def _divisors(count: int) -> list[int]:
    return [size for size in range(count, 0, -1) if count % size == 0]


def _halves(count: int) -> list[int]:
    made = [count]
    while made[-1] > 1:
        made.append(made[-1] // 2)
    return made


def describe(config: EraseConfig) -> str:
    """The settings that a budget decides, in words."""
    memory = config.memory
    said = [f"the base in {memory.quantize}"] if memory.quantize != "none" else []
    said += ["the base offloaded to the CPU"] if memory.offload else []
    said += ["gradient checkpointing"] if memory.gradient_checkpointing else []
    if memory.per_device_batch_size < config.training.train_batch_size:
        said += [f"micro-batches of {memory.per_device_batch_size}"]
    count = config.buffer.rollout_batch_size
    return ", ".join([*said, f"{count} trajectories side by side" if count > 1 else "1 trajectory at a time"])


def amount(size: float) -> str:
    """Bytes, in the unit that fits."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def plan_table(plan: MemoryPlan) -> str:
    """Return the table that `--plan` prints."""
    lines = [f"predicted: {describe(plan.config)}", "", f"{'phase':<12}{'peak':>12}"]
    lines += [f"{name:<12}{amount(size):>12}" for name, size in plan.phases.items()]
    buffer = f"the buffer takes {amount(plan.buffer_bytes)} of host memory"
    lines += ["", f"at most {plan.nfe:,} denoiser evaluations (NFE); {buffer}"]
    return "\n".join(lines)


def _line(points: list[int], count: int) -> int:
    """The value at `count` of the line through the values at 1 and 2."""
    return points[0] + (count - 1) * (points[1] - points[0])


def _activations(
    family: ModelFamily,
    denoiser: ModelMixin,
    noise: Tensor,
    embeds: PromptEmbeds,
    on_gpu: bool,
    count: int,
    learns: bool = False,
    checkpointing: bool = False,
) -> int:
    """Bytes that a forward pass of `count` samples needs besides the weights; with a backward pass if it learns.

    All in the denoiser's dtype: where autocast would compute in half precision it is more than that takes.
    """
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    else:
        denoiser.disable_gradient_checkpointing()
    latents = noise.expand(count, *noise.shape[1:]).to(META, denoiser.dtype)
    here = {name: value.expand(count, *value.shape[1:]) for name, value in embeds.items()}
    here = {name: value.to(denoiser.dtype) if value.is_floating_point() else value for name, value in here.items()}
    with track_memory(denoiser, channels_last=on_gpu) as meter, torch.set_grad_enabled(learns):
        prediction = family.predict(denoiser, latents, torch.zeros(count, device=META), here)
        if learns:
            prediction.float().square().mean().backward()
    for parameter in denoiser.parameters():
        parameter.grad = None
    return meter.peak


def _attention_activations(family: ModelFamily, denoiser: ModelMixin, embeds: PromptEmbeds, count: int) -> int:
    """Bytes that a step of the cross-attention layers needs for `count` samples: their activations, all at once."""
    tokens = embeds[TOKENS].expand(count, *embeds[TOKENS].shape[1:]).to(denoiser.dtype)
    with track_memory(denoiser) as meter:
        total = torch.zeros((), device=META)
        for name in family.cross_attention(denoiser):
            layer = AttentionLayer(denoiser.get_submodule(name))
            states = torch.empty(count, POSITIONS, layer.width, device=META, dtype=denoiser.dtype)
            total = total + layer(states, tokens).float().square().mean()
        if total.requires_grad:
            total.backward()
    for parameter in denoiser.parameters():
        parameter.grad = None
    return meter.peak
