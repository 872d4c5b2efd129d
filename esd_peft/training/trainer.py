"""The training loop: batches in, a trained student out."""

import bisect
import contextlib
import itertools
import math
import warnings
from typing import Any, NoReturn, cast

import torch
from diffusers.optimization import get_scheduler
from pydantic import ConfigDict, TypeAdapter, with_config
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.errors import UserError, in_brief
from esd_peft.models.quantize import bitsandbytes
from esd_peft.runtime import distributed, interrupts
from esd_peft.runtime.tracking import Report
from esd_peft.training.checkpoint import Checkpoints
from esd_peft.training.early_stopping import EVERY, Probe
from esd_peft.training.esd import Batch, Objective, Supply
from esd_peft.training.student import Student

LOSS_EVERY = 10  # steps between readings of the loss: each one waits for the device


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """PyTorch's AdamW or one of bitsandbytes', with their default betas (0.9, 0.999)."""
    if name == "AdamW":
        # fused: all tensors in one launch, and float16's loss scaling is looked at on the GPU instead of by the host
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=parameters[0].is_cuda)
    return getattr(bitsandbytes(f"--optimizer {name}").optim, name)(parameters, lr=lr, weight_decay=weight_decay)


def distill(
    student: Student,
    objective: Objective,
    generator: torch.Generator,
    probe: Probe | None = None,
    report: Report = lambda values, step: None,
    checkpoints: Checkpoints | None = None,
) -> list[float]:
    """Train the student in place; returns every ten steps' mean loss.

    For as many steps as the config or else the objective says, or until the probe says enough. Goes on from a checkpoint
    where the config says so, and leaves one on Ctrl-C or a SIGTERM, which end it after the step at hand.

    Raises `UserError` if the loss is no longer a number, `KeyboardInterrupt` if it was interrupted.
    """
    config = objective.rollout.config
    training = _Training(student, objective, probe)
    supply = None
    if config.resume:
        supply = training.restore(*distributed.from_first(checkpoints and checkpoints.load()))
    elif probe is not None:
        probe.measure(0)
    batches, begun = objective.batches(generator, supply), training.step
    with (
        tqdm(total=training.steps, initial=training.step, desc="distill", disable=not distributed.first()) as bar,
        interrupts.noted() as seen,
    ):
        begun = training.step
        while training.step < training.steps:
            try:
                training.take(next(batches))
            except interrupts.InterruptedBetweenSteps:  # while the bank was filled or words were sought
                interrupted, done = True, False
            else:
                due = probe is not None and training.step % EVERY == 0
                enough = due and distributed.any_of(probe is not None and probe.enough(training.step))
                interrupted = distributed.any_of(bool(seen))
                done = enough or training.step == training.steps
                if training.step % LOSS_EVERY == 0 or done:
                    report(training.read_loss(), training.step)
                    bar.set_postfix(loss=f"{training.losses[-1]:.5f}", refresh=False)
                bar.update()
            if done:
                break
            if checkpoints is not None and training.step > begun and (interrupted or training.step % checkpoints.every == 0):
                checkpoints.save(training.step, *training.state())
            if interrupted:
                distributed.any_of(True)  # nobody leaves before the checkpoint is there: the launcher then ends the others
                _stop(training)
        if checkpoints is not None and training.step > begun:
            with contextlib.suppress(UserError):  # a disk too full for it may have room for the adapter
                checkpoints.save(training.step, training.state(done=True)[0], None)
        if distributed.any_of(bool(seen)):  # during the last step, or since
            distributed.any_of(True)
            _stop(training)
    if config.gradient_checkpointing:
        student.denoiser.disable_gradient_checkpointing()
    return training.losses


def _stop(training: "_Training") -> NoReturn:
    if not training.step:
        raise KeyboardInterrupt
    raise KeyboardInterrupt(f"after step {training.step} of {training.steps}; --resume goes on from there")


class _Training:
    """Everything that changes from step to step."""

    def __init__(self, student: Student, objective: Objective, probe: Probe | None) -> None:
        self.student, self.objective, self.probe = student, objective, probe
        rollout = self.rollout = objective.rollout
        config = rollout.config
        self.parts = objective.parts
        self.ends = [*itertools.accumulate(self.parts)]
        self.steps = self.ends[-1]
        self._start_anew(self.parts[0])
        self.scaler = torch.amp.GradScaler(rollout.device.type, enabled=rollout.dtype == torch.float16)
        # forward, backward (counted as two), and a second forward
        self.passes = 4 if config.gradient_checkpointing else 3
        if config.gradient_checkpointing:
            student.denoiser.enable_gradient_checkpointing()
        self.step = 0
        self.losses: list[float] = []
        self.unread: list[tuple[Tensor, Tensor]] = []  # each step's loss and timesteps since the last reading

    def _start_anew(self, steps: int) -> None:
        """A new optimizer, and its learning rate's course over so many steps."""
        config, objective = self.rollout.config, self.objective
        lr = config.learning_rate or objective.learning_rate
        self.optimizer = make_optimizer(config.optimizer, self.student.parameters, lr, objective.weight_decay)
        courses = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": steps}
        self.schedule = get_scheduler(config.lr_scheduler, self.optimizer, **courses)

    def take(self, batch: Batch) -> None:
        """One optimizer step."""
        config, rollout = self.rollout.config, self.rollout
        if self.step in self.ends:
            self._start_anew(self.parts[self.ends.index(self.step) + 1])
        total = torch.zeros((), device=rollout.device)
        for part in batch.split(config.micro_batch_size or len(batch), distributed.share(len(batch))):
            with rollout.autocast():
                inputs = part.inputs.to(rollout.dtype)
                prediction = rollout.backbone.predict(self.student.denoiser, inputs, part.timesteps, part.embeds)
            loss = self.objective.loss(prediction, part)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if distributed.size() > 1:
            self._add_up(total)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.student.parameters, config.max_grad_norm)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # a skipped fp16 step is no mistake
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.student.project()
        self.schedule.step()
        self.unread.append((total, batch.timesteps))
        rollout.costs.forward_equivalents += self.passes * len(batch)
        rollout.costs.training_tuples += batch.erasing
        self.step += 1

    def _add_up(self, loss: Tensor) -> None:
        """Each process's share of a batch is weighted by its size already: what is left is to sum."""
        for parameter in self.student.parameters:
            if parameter.grad is None:  # its share is empty
                parameter.grad = torch.zeros_like(parameter)
        distributed.add_up([loss, *(p.grad for p in self.student.parameters if p.grad is not None)])

    def read_loss(self) -> dict[str, float]:
        """The mean since the last reading, added to `losses`. Raises `UserError` if one is not a number."""
        losses = torch.stack([loss for loss, _ in self.unread])
        mean = losses.mean().item()
        if not math.isfinite(mean):
            first = next(i for i, value in enumerate(losses.tolist()) if not math.isfinite(value))
            timesteps = ", ".join(f"{t:g}" for t in self.unread[first][1].tolist())
            raise UserError(
                f"the loss is no longer a number at step {self.step - len(losses) + first + 1} (timesteps {timesteps}); "
                "lower --learning-rate or --max-grad-norm, or use --dtype float32"
            )
        self.losses.append(mean)
        self.unread = []
        return {"loss": self.losses[-1], "learning_rate": self.schedule.get_last_lr()[0]}

    def state(self, done: bool = False) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """What a checkpoint holds, and the bank; of a training that is `done` only what was learned matters."""
        supply, costs = self.objective.supply(self.step), self.rollout.costs
        values = {
            "step": self.step,
            "done": done,
            "parameters": [p.detach() for p in self.student.parameters],
            "optimizer": {} if done else self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "unread": self.unread,
            "before": supply.before,
            "words": supply.words,
            "curve": self.probe.curve if self.probe else [],
            "forwards": costs.forward_equivalents,
            "tuples": costs.training_tuples,
        }
        return values, supply.bank

    def restore(self, values: dict[str, Any], bank: dict[str, Tensor] | None) -> Supply:
        """Become what `state` was taken of; returns where the batches go on. Raises `UserError` if it does not fit."""
        try:
            return self._restored(cast(dict[str, Any], _STATE.validate_python(values)), bank)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PyTorch's kinds for a state that is another's are many
            reason = in_brief(error)
            raise UserError(f"--resume: the checkpoint does not fit ({reason}); add --overwrite to start anew") from None

    def _restored(self, values: dict[str, Any], bank: dict[str, Tensor] | None) -> Supply:
        if not 0 < values["step"] <= self.steps:
            raise ValueError(f"step {values['step']} of {self.steps}")
        with torch.no_grad():
            for parameter, value in zip(self.student.parameters, values["parameters"], strict=True):
                parameter.copy_(value)
        self._start_anew(self.parts[bisect.bisect_left(self.ends, values["step"])])
        if values["done"]:
            self.steps = values["step"]
        else:
            _same_kind(values["schedule"], self.schedule.state_dict())
            _same_kind(values["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"])
            self.optimizer.load_state_dict(values["optimizer"])
            self.schedule.load_state_dict(values["schedule"])
            self.scaler.load_state_dict(values["scaler"])
        device = self.rollout.device
        self.step, self.losses = values["step"], values["losses"]
        self.unread = [(loss.to(device), timesteps) for loss, timesteps in values["unread"]]
        if self.probe is not None:
            self.probe.curve = [(step, fraction) for step, fraction in values["curve"]]
        self.rollout.costs.forward_equivalents = values["forwards"]
        self.rollout.costs.training_tuples = values["tuples"]
        return Supply(self.step, values["before"], bank, values["words"])


@with_config(ConfigDict(arbitrary_types_allowed=True))
class _State(TypedDict):
    """What a checkpoint holds."""

    step: int
    done: bool
    parameters: list[Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    losses: list[float]
    unread: list[tuple[Tensor, Tensor]]
    before: Tensor | None
    words: list[dict[str, Tensor]]
    curve: list[tuple[int, float]]
    forwards: int
    tuples: int


_STATE = TypeAdapter(_State)


def _same_kind(given: Any, known: Any) -> None:
    """Raise `TypeError` unless `given` could stand where `known` does: PyTorch takes anything, and stumbles later."""
    if isinstance(known, dict):
        if not isinstance(given, dict) or given.keys() != known.keys():
            raise TypeError(f"{given!r} is not like {known!r}")
        for key in known:
            _same_kind(given[key], known[key])
    elif isinstance(known, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(known):
            raise TypeError(f"{given!r} is not like {known!r}")
        for one, other in zip(given, known, strict=True):
            _same_kind(one, other)
    elif isinstance(known, int | float) != isinstance(given, int | float):
        raise TypeError(f"{given!r} is not like {known!r}")
