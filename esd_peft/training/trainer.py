"""The optimizer step, and the state that changes from step to step."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from esd_kernels import unit_gradient
from esd_peft.errors import UserError
from esd_peft.models.quantize import bitsandbytes
from esd_peft.options.memory import MemoryOptions
from esd_peft.options.training import TrainingOptions
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import is_accelerator
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.batch import Batch
from esd_peft.training.method import Method
from esd_peft.training.work import nfe_per_sample


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """PyTorch's AdamW or one of bitsandbytes', with their default betas (0.9, 0.999)."""
    if name == "AdamW":
        # fused: all tensors in one launch, and float16's loss scaling is looked at on the GPU instead of by the host
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=is_accelerator(parameters[0].device))
    return getattr(bitsandbytes(f"--optimizer {name}").optim, name)(parameters, lr=lr, weight_decay=weight_decay)


def restore(optimizer: torch.optim.Optimizer, schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Restore both from "optimizer" and "schedule" of `state`. Raises `TypeError` for what does not fit."""
    _check_alike(state["schedule"], schedule.state_dict())
    _check_alike(state["optimizer"]["param_groups"], optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])


class Trainer:
    """Trains what the `method` names, in place: the same optimizer step for every learner."""

    def __init__(self, method: Method, training: TrainingOptions, memory: MemoryOptions, profiler: PhaseProfiler) -> None:
        self.learner, self.loss, self.profiler = method.learner, method.loss, profiler
        self.student = student = method.learner.student
        self.per_device_batch_size, self.max_grad_norm = memory.per_device_batch_size, method.max_grad_norm
        self.steps = training.max_train_steps
        self.optimizer = make_optimizer(
            training.optimizer, self.learner.parameters, training.learning_rate, method.weight_decay
        )
        courses = {"num_warmup_steps": 0, "num_training_steps": self.steps}
        self.schedule = get_scheduler(training.lr_scheduler, self.optimizer, **courses)
        self.scaler = torch.amp.GradScaler(student.device.type, enabled=student.dtype == torch.float16)
        self.nfe_per_sample = self.learner.evaluations * nfe_per_sample(memory.gradient_checkpointing)
        if memory.gradient_checkpointing:
            student.denoiser.enable_gradient_checkpointing()
        self.taken = 0  # optimizer steps
        self.losses: list[float] = []  # the mean of the steps between two readings
        self.unread: list[tuple[Tensor, Tensor | None]] = []  # each step's loss and timesteps since the last reading

    def step(self, batch: Batch) -> None:
        """Take an optimizer step on the batch, of which `per_device_batch_size` samples are on the device at a time.

        The loss stays on the device until `read_loss`.
        """
        total = torch.zeros((), device=self.student.device)
        for part in batch.split(self.per_device_batch_size, distributed.share(len(batch))):
            loss = self.loss(self.learner.predict(part.samples, part.embeds), part)
            loss.backward(self.scaler.scale(unit_gradient(loss)))  # the kernel knows this one, and launches nothing for it
            total += loss.detach()
        self._sum_over_processes(total)
        self.scaler.unscale_(self.optimizer)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.learner.parameters, self.max_grad_norm)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # a skipped fp16 step is no mistake
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.project()
        self.schedule.step()
        self.unread.append((total / batch.weight.mean(), batch.samples.get("timesteps")))
        self.profiler.nfe += self.nfe_per_sample * len(batch)
        self.profiler.count(self.learner.part, {self.learner.step: len(batch)})
        self.profiler.training_samples += batch.num_concept_samples
        self.taken += 1

    def _sum_over_processes(self, loss: Tensor) -> None:
        """Sum the gradients of all processes, whose shares of the batch are weighted by their sizes already."""
        if distributed.world_size() == 1:
            return
        for parameter in self.learner.parameters:
            if parameter.grad is None:  # its share is empty
                parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce([loss, *(p.grad for p in self.learner.parameters if p.grad is not None)])

    def read_loss(self) -> dict[str, float]:
        """The mean since the last reading, added to `losses`. Raises `UserError` if one is not a number."""
        losses = torch.stack([loss for loss, _ in self.unread])
        mean = losses.mean().item()
        if not math.isfinite(mean):
            first = next(i for i, value in enumerate(losses.tolist()) if not math.isfinite(value))
            timesteps = self.unread[first][1]
            where = "" if timesteps is None else f" (timesteps {', '.join(f'{t:g}' for t in timesteps.tolist())})"
            raise UserError(
                f"the loss is no longer a number at step {self.taken - len(losses) + first + 1}{where}; "
                "lower --learning-rate, or use --dtype float32"
            )
        self.losses.append(mean)
        self.unread = []
        return {"loss": self.losses[-1], "learning_rate": self.schedule.get_last_lr()[0]}

    def state_dict(self, done: bool = False) -> dict[str, Any]:
        """Return the contents of a checkpoint; of a training that is `done` only what was learned."""
        return {
            "step": self.taken,
            "done": done,
            "parameters": [p.detach() for p in self.student.parameters],
            "optimizer": {} if done else self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "unread": self.unread,
            "nfe": self.profiler.nfe,
            "calls": dict(self.profiler.calls),
            "training_samples": self.profiler.training_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` was taken of. Raises `ValueError` or `TypeError` for one that does not fit."""
        if not 0 < state["step"] <= self.steps or state["done"] != (state["step"] == self.steps):
            raise ValueError(f"step {state['step']} of {self.steps}")
        self.student.take(state["parameters"])
        if not state["done"]:
            restore(self.optimizer, self.schedule, state)
            self.scaler.load_state_dict(state["scaler"])
        self.taken, self.losses = state["step"], state["losses"]
        self.unread = [(loss.to(self.student.device), timesteps) for loss, timesteps in state["unread"]]
        self.profiler.nfe, self.profiler.training_samples = state["nfe"], state["training_samples"]
        self.profiler.calls = Counter(state["calls"])


def _check_alike(given: Any, known: Any) -> None:
    """Raise `TypeError` unless `given` could stand where `known` does: PyTorch takes anything, and stumbles later."""
    if isinstance(known, dict):
        if not isinstance(given, dict) or given.keys() != known.keys():
            raise TypeError(f"{given!r} is not like {known!r}")
        for key in known:
            _check_alike(given[key], known[key])
    elif isinstance(known, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(known):
            raise TypeError(f"{given!r} is not like {known!r}")
        for one, other in zip(given, known, strict=True):
            _check_alike(one, other)
    elif isinstance(known, int | float) != isinstance(given, int | float):
        raise TypeError(f"{given!r} is not like {known!r}")
