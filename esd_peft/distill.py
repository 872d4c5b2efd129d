"""The training loop: batches in, a trained student out."""

import math
import warnings

import bitsandbytes
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm import tqdm

from esd_peft.adapters import Student
from esd_peft.errors import UserError
from esd_peft.objectives import Objective
from esd_peft.probe import EVERY, Probe
from esd_peft.tracking import Report

LOSS_EVERY = 10  # steps between readings of the loss: each one waits for the device


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """PyTorch's AdamW or one of bitsandbytes', with their default betas (0.9, 0.999)."""
    if name == "AdamW":
        # fused: all tensors in one launch, and float16's loss scaling is looked at on the GPU instead of by the host
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=parameters[0].is_cuda)
    return getattr(bitsandbytes.optim, name)(parameters, lr=lr, weight_decay=weight_decay)


def distill(
    student: Student,
    objective: Objective,
    generator: torch.Generator,
    probe: Probe | None = None,
    report: Report = lambda values, step: None,
) -> list[float]:
    """Train the student in place; returns every ten steps' mean loss.

    For as many steps as the config or else the objective says, or until the probe says enough.

    Raises `UserError` if the loss is no longer a number.
    """
    rollout = objective.rollout
    config, device, dtype, costs = rollout.config, rollout.device, rollout.dtype, rollout.costs
    supply = objective.batches(generator)
    steps, lr = config.max_train_steps or objective.steps, config.learning_rate or objective.learning_rate
    optimizer = make_optimizer(config.optimizer, student.parameters, lr, objective.weight_decay)
    courses = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": steps}
    schedule = get_scheduler(config.lr_scheduler, optimizer, **courses)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    passes = 4 if config.gradient_checkpointing else 3  # forward, backward (counted as two), and a second forward
    if config.gradient_checkpointing:
        student.denoiser.enable_gradient_checkpointing()
    if probe is not None:
        probe.measure(0)
    losses: list[float] = []
    running, since = torch.zeros((), device=device), 0
    with tqdm(total=steps, desc="distill") as bar:
        for step in range(1, steps + 1):
            batch = next(supply)
            for part in batch.split(config.micro_batch_size or len(batch)):
                with rollout.autocast():
                    inputs = part.inputs.to(dtype)
                    prediction = rollout.backbone.predict(student.denoiser, inputs, part.timesteps, part.embeds)
                loss = objective.loss(prediction, part) * (len(part) / len(batch))
                scaler.scale(loss).backward()
                running = running + loss.detach()
            _update(student.parameters, optimizer, scaler, config.max_grad_norm)
            student.project()
            schedule.step()
            costs.forward_equivalents += passes * len(batch)
            costs.training_tuples += batch.erasing
            since += 1
            bar.update()
            enough = probe is not None and step % EVERY == 0 and probe.enough(step)
            if step % LOSS_EVERY == 0 or step == steps or enough:
                losses.append(running.item() / since)
                running, since = torch.zeros((), device=device), 0
                if not math.isfinite(losses[-1]):
                    raise UserError(f"the loss is no longer a number at step {step}; lower --learning-rate")
                bar.set_postfix(loss=f"{losses[-1]:.5f}", refresh=False)
                report({"loss": losses[-1], "learning_rate": schedule.get_last_lr()[0]}, step)
            if enough:
                break
    if config.gradient_checkpointing:
        student.denoiser.disable_gradient_checkpointing()
    return losses


def _update(
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> None:
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # a skipped fp16 step is no mistake
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
