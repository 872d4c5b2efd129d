"""What a run takes, before it is run: memory by phase, forwards, the bank's size; and settings that fit a budget."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from diffusers import ModelMixin
from torch import Tensor

from esd_peft.attacks.attack import BATCH_SIZE
from esd_peft.cli import parse_bytes
from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.models import Backbone, PromptEmbeds
from esd_peft.models.compilation import repeated_blocks
from esd_peft.models.family import ENCODE_BATCH, encoder_bytes
from esd_peft.prompts.plan import plan_prompts
from esd_peft.runtime.devices import resolve_device, resolve_dtype
from esd_peft.runtime.memory_meter import metered, weight_bytes
from esd_peft.training.adversarial import round_forwards, steps_of_rounds
from esd_peft.training.contrastive import Contrastive
from esd_peft.training.esd import GuidedTarget, bank_shape, held_samples
from esd_peft.training.student import make_student

META = torch.device("meta")
GIB = 2**30
ROOM = 0.92  # of a budget is planned for: allocators round up and leave gaps


@dataclass
class Plan:
    """What was predicted for the settings of `config`. Bytes of device memory, without the driver's own."""

    config: EraseConfig
    phases: dict[str, int]
    bank_bytes: int  # in host memory
    forward_equivalents: int

    @property
    def peak(self) -> int:
        """The largest phase."""
        return max(self.phases.values())


def make_plan(config: EraseConfig, backbone: Backbone) -> Plan:
    """The plan for `config` on the device it names, with the settings that fit its budget.

    With `--device auto` on a machine without a GPU the plan is for a 12 GiB one. Raises `UserError` if nothing fits.
    """
    if config.objective != "esd":
        raise UserError("--plan and --memory-budget work with --objective esd only; leave them out")
    device = resolve_device(config.device)
    imagined = device.type == "cpu" and config.device == "auto"
    half = torch.bfloat16 if imagined and config.dtype == "auto" else resolve_dtype(config.dtype, device)
    budget = parse_bytes(config.memory_budget) if config.memory_budget != "auto" else None
    if budget is None and device.type == "cuda":
        budget = _free(device)
    elif budget is None and imagined:
        budget = 12 * GIB
    sizes = Sizes(config, backbone, half)
    return sizes.plan(config) if budget is None else fit(sizes, config, budget)


def _free(device: torch.device) -> int:
    """Bytes of the GPU that nobody uses; PyTorch keeps for itself what this process has freed."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def within_budget(config: EraseConfig, backbone: Backbone) -> EraseConfig:
    """The config with the settings that fit its budget; says which, where they are not those it came with."""
    if config.objective != "esd" and config.memory_budget == "auto":
        return config
    planned = make_plan(config, backbone).config
    if planned != config:
        print(f"to stay within the memory budget: {describe(planned)}")
    return planned


class Sizes:
    """All that plans of one model and one set of prompts are made up of, measured on the meta device."""

    def __init__(self, config: EraseConfig, backbone: Backbone, dtype: torch.dtype) -> None:
        self.backbone, self.dtype, self.prompts = backbone, dtype, plan_prompts(config)
        self.encoders, self.attacking, embeds = self._encoding()
        self.embeds = sum(value.numel() * value.element_size() for value in embeds.values()) * len(self.prompts.texts)
        self.width = max(value.shape[-1] for value in embeds.values())
        denoiser = backbone.empty_denoiser().to(torch.float32 if config.adapter == "none" else dtype)
        self.bases = {how: weight_bytes(denoiser, how) for how in ("none", "int8", "nf4")}
        self.block = max(map(weight_bytes, repeated_blocks(denoiser)))
        noise = backbone.initial_latents(1, denoiser, torch.Generator())
        self.latents = noise.numel()
        self.drawing = self._decoding(backbone.vae_latents(noise))
        student = make_student(backbone, denoiser, config)
        learning = sum(p.numel() for p in student.parameters) * 4
        # two moments, in 8 bits a quarter of their size; and the adapter, or the teacher's copy of the weights
        self.learning = int(learning * (1 + (0.5 if "8bit" in config.optimizer else 2)))
        if denoiser.dtype != dtype:  # autocast keeps a copy of each weight for the backward pass
            self.learning += sum(p.numel() for p in denoiser.parameters()) * dtype.itemsize
        self._work = functools.partial(_activations, backbone, denoiser, noise, embeds)
        self.running = [self._work(count) for count in (1, 2)]

    @functools.cache  # noqa: B019 (a `Sizes` lives as long as its planning)
    def training(self, checkpointing: bool) -> list[int]:
        """Bytes that a training step of one sample, and of two, needs besides weights."""
        return [self._work(count, learns=True, checkpointing=checkpointing) for count in (1, 2)]

    def _encoding(self) -> tuple[int, int, PromptEmbeds]:
        """Bytes of the text encoders and what they need at work, layer by layer where they are large, and as a whole; the
        embeddings of one prompt."""
        pipe = self.backbone.assemble(self.backbone.text_parts, self.dtype, empty=True)
        encoders = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        with metered(*encoders) as meter, torch.no_grad():
            embeds = self.backbone.encode_prompts(pipe, ["a picture"] * min(ENCODE_BATCH, len(self.prompts.texts)), META)
        there, whole = encoder_bytes(pipe)
        one = {name: value[:1].clone() for name, value in embeds.items()}
        return there + meter.peak, whole + meter.peak, one

    def _decoding(self, latents: Tensor) -> int:
        """Bytes of the VAE and what it needs to draw one picture."""
        vae = self.backbone.empty_part("vae", self.dtype)
        with metered(vae) as meter, torch.no_grad():
            vae.decode(latents.to(META, self.dtype), return_dict=False)
        return weight_bytes(vae) + meter.peak

    def plan(self, config: EraseConfig) -> Plan:
        """For a config that differs in settings only."""
        rows = 3 if any(p.anchor is not None for p in self.prompts.pairs) else 2
        batch = _batch_size(config)
        held = held_samples(config, batch)
        trajectories, preserving, keep = bank_shape(config, batch - held, held, len(self.prompts.preserve))
        steps = config.num_inference_steps or self.backbone.num_inference_steps
        weights = self.block if config.offload else self.bases[config.quantize]
        working = weights + self.learning + self.embeds
        together = rows * min(config.rollout_batch_size, trajectories + preserving)
        training = self.training(config.gradient_checkpointing)
        phases = {
            "encode": self.encoders,
            # null space and closed form: copies of the embeddings, and squares of their width in fp64
            "load": weights + 3 * self.embeds + 6 * 8 * self.width**2,
            "rollout": working + _line(self.running, together),
            "distill": working + _line(training, config.micro_batch_size or batch),
        }
        if config.eval_seeds:
            pictures = min(config.rollout_batch_size, config.eval_seeds * (len(config.concept) + 3))
            phases["evaluate"] = working + max(self.drawing, _line(self.running, 2 * pictures))
        train_steps = config.max_train_steps or config.guided_steps
        parts = steps_of_rounds(train_steps, config.robust)
        if config.robust:
            phases["attack"] = working + self.attacking + _line(training, BATCH_SIZE)
        fills = sum(-(-part // (config.steps_per_bank or part)) for part in parts)
        kept = (trajectories + preserving) * min(steps, keep or steps)
        forwards = fills * (trajectories + preserving) * steps * rows
        forwards += train_steps * batch * (4 if config.gradient_checkpointing else 3)
        forwards += config.robust * len(config.concept) * round_forwards(steps, rows)
        return Plan(config, phases, kept * self.latents * (1 + rows) * self.dtype.itemsize, forwards)


def fit(sizes: Sizes, config: EraseConfig, budget: int) -> Plan:
    """The cheapest settings whose predicted peak is within `budget` bytes. Raises `UserError` if none is.

    In this order: all of a batch at once, then fewer and fewer samples at a time, then that with activations recomputed,
    then all of it again with the base in NF4, and at last with the base in host memory. What the config sets itself stays.
    """
    plans = []
    for settings in _settings(config):
        plans.append(sizes.plan(config.model_copy(update=settings)))
        if plans[-1].peak <= ROOM * budget:
            return plans[-1]
    best = min(plans, key=lambda plan: plan.peak)
    phase = max(best.phases, key=lambda name: best.phases[name])
    missing = best.peak / ROOM - budget
    raise UserError(
        f"--memory-budget {amount(budget)} is {amount(missing)} short: {phase} takes {amount(best.phases[phase])} "
        f"even with {describe(best.config)}; give more, or take a smaller model"
    )


def smaller(sizes: Sizes, given: EraseConfig, used: EraseConfig, phase: str) -> EraseConfig | None:
    """The next settings after those of `used`, in the order of `fit`, with which `phase` takes less; none if there are none.

    Nothing is taken back for it, and no other phase takes more. What `given`, the config as it came, sets itself stays.
    """
    now = sizes.plan(used).phases
    for settings in _settings(given):
        plan = sizes.plan(given.model_copy(update=settings))
        back = any(new > old for new, old in zip(_at_once(plan.config), _at_once(used), strict=True))
        more = any(size > now[name] for name, size in plan.phases.items())
        if not back and not more and plan.phases.get(phase, 0) < now.get(phase, 0):
            return plan.config
    return None


def _at_once(config: EraseConfig) -> tuple[int, int, bool]:
    """What is on the device together: samples, trajectories, and all of a sample's activations."""
    return config.micro_batch_size or _batch_size(config), config.rollout_batch_size, not config.gradient_checkpointing


def _batch_size(config: EraseConfig) -> int:
    objective = Contrastive if config.objective == "contrastive" else GuidedTarget
    return config.train_batch_size or objective.train_batch_size


def _settings(config: EraseConfig) -> Iterator[dict[str, object]]:
    bases: list[dict[str, object]] = [{}]
    offloadable = config.adapter != "none" and config.compile != "on"
    if config.quantize == "none" and not config.offload:
        bases += [{"quantize": "nf4"}] if config.adapter == "lora" and find_spec("bitsandbytes") else []
        bases += [{"offload": True, "gradient_checkpointing": True}] if offloadable else []
    batch = config.micro_batch_size or _batch_size(config)
    default = EraseConfig.model_fields["rollout_batch_size"].default
    rollouts = _halves(default) if config.rollout_batch_size == default else [config.rollout_batch_size]
    for base in bases:
        for checkpointing in sorted({config.gradient_checkpointing, True}):
            for micro in [batch] if config.micro_batch_size else _halves(batch):
                for side_by_side in rollouts:
                    yield {
                        "gradient_checkpointing": checkpointing,
                        "micro_batch_size": config.micro_batch_size if micro == batch else micro,
                        "rollout_batch_size": side_by_side,
                    } | base


def _halves(count: int) -> list[int]:
    made = [count]
    while made[-1] > 1:
        made.append(made[-1] // 2)
    return made


def describe(config: EraseConfig) -> str:
    """The settings that a budget decides, in words."""
    said = [f"the base in {config.quantize}"] if config.quantize != "none" else []
    said += ["the base in host memory"] if config.offload else []
    said += ["activations recomputed"] if config.gradient_checkpointing else []
    said += [f"{config.micro_batch_size} of a batch's samples at a time"] if config.micro_batch_size else []
    return ", ".join([*said, f"{config.rollout_batch_size} trajectories side by side"])


def amount(size: float) -> str:
    """Bytes, in the unit that fits."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def plan_table(plan: Plan) -> str:
    """What `--plan` prints."""
    lines = [f"predicted: {describe(plan.config)}", "", f"{'phase':<12}{'peak':>12}"]
    lines += [f"{name:<12}{amount(size):>12}" for name, size in plan.phases.items()]
    bank = f"the bank takes {amount(plan.bank_bytes)} of host memory"
    lines += ["", f"{plan.forward_equivalents:,} forward-equivalents; {bank}"]
    return "\n".join(lines)


def _line(points: list[int], count: int) -> int:
    """The value at `count` of the line through the values at 1 and 2."""
    return points[0] + (count - 1) * (points[1] - points[0])


def _activations(
    backbone: Backbone,
    denoiser: ModelMixin,
    noise: Tensor,
    embeds: PromptEmbeds,
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
    told = {name: value.expand(count, *value.shape[1:]) for name, value in embeds.items()}
    told = {name: value.to(denoiser.dtype) if value.is_floating_point() else value for name, value in told.items()}
    with metered(denoiser) as meter, torch.set_grad_enabled(learns):
        prediction = backbone.predict(denoiser, latents, torch.zeros(count, device=META), told)
        if learns:
            prediction.float().square().mean().backward()
    for parameter in denoiser.parameters():
        parameter.grad = None
    return meter.peak
