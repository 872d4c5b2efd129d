"""The training loop: batches of guided pairs in, a trained student out."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator

import bitsandbytes
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from tqdm import tqdm

from esd_peft.adapters import Student
from esd_peft.backbones.backbone import pick
from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.objectives import esd_loss, esd_task
from esd_peft.rollout import Bank, Rollout

LOSS_EVERY = 10  # steps between readings of the loss: each one waits for the device


def erasing_rows(config: EraseConfig) -> int:
    """Samples of a batch that erase; the others hold the prediction without a prompt."""
    return config.train_batch_size - int(config.hold * config.train_batch_size)


def batches(rollout: Rollout, generator: torch.Generator) -> Iterator[Bank]:
    """Training batches without end; the erasing samples come first.

    With teacher rollouts the bank is filled once and reshuffled when it is used up. With student rollouts it is
    filled for `refill_every` steps at a time. Fill time goes to the phase "rollout".
    """
    config = rollout.config
    erasing = erasing_rows(config)
    held = config.train_batch_size - erasing
    concepts = itertools.cycle(range(1, len(config.concept) + 1))
    once = config.rollout == "teacher"
    needed = erasing * config.refill_every
    trajectories = config.trajectories if once else min(config.trajectories, needed)
    keep = None if once else math.ceil(needed / trajectories)
    while True:
        with rollout.costs.phase("rollout"):
            prompts = torch.tensor([*itertools.islice(concepts, trajectories)])
            bank = rollout.fill(prompts, generator, keep, progress=once)
        order = _shuffled(len(bank), generator)
        for _ in itertools.count() if once else range(config.refill_every):
            chosen = [*itertools.islice(order, erasing), *torch.randint(len(bank), (held,), generator=generator).tolist()]
            yield bank.take(torch.tensor(chosen), rollout.device)


def _shuffled(size: int, generator: torch.Generator) -> Iterator[int]:
    """The numbers below `size` in random order, then again in another, without end."""
    while True:
        yield from torch.randperm(size, generator=generator).tolist()


def make_optimizer(name: str, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """PyTorch's AdamW or one of bitsandbytes', with their default betas and no weight decay."""
    if name == "AdamW":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    return getattr(bitsandbytes.optim, name)(parameters, lr=lr, weight_decay=0.0)


def distill(
    student: Student,
    rollout: Rollout,
    generator: torch.Generator,
    report: Callable[[dict[str, float], int], None] = lambda values, step: None,
) -> list[float]:
    """Train the student in place for `max_train_steps` batches; returns the mean loss of every ten steps.

    Raises `UserError` if the loss is no longer a number.
    """
    config, device, dtype, costs = rollout.config, rollout.device, rollout.dtype, rollout.costs
    supply = batches(rollout, generator)
    optimizer = make_optimizer(config.optimizer, student.parameters, config.learning_rate)
    steps = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
    schedule = get_scheduler(config.lr_scheduler, optimizer, **steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    erasing = erasing_rows(config)
    passes = 4 if config.gradient_checkpointing else 3  # forward, backward (counted as two), and a second forward
    if config.gradient_checkpointing:
        student.denoiser.enable_gradient_checkpointing()
    losses: list[float] = []
    running = torch.zeros((), device=device)
    with tqdm(total=config.max_train_steps, desc="distill") as bar:
        for step in range(1, config.max_train_steps + 1):
            batch = next(supply)
            task = esd_task(batch, config.eta, len(batch) - erasing)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                inputs = batch.inputs.to(dtype)
                embeds = pick(rollout.embeds, task.prompts)
                prediction = rollout.backbone.predict(student.denoiser, inputs, batch.timesteps, embeds)
            loss = esd_loss(prediction, batch, task)
            _update(loss, student.parameters, optimizer, scaler, config.max_grad_norm)
            schedule.step()
            costs.forward_equivalents += passes * len(batch)
            costs.training_tuples += erasing
            running += loss.detach()
            bar.update()
            if step % LOSS_EVERY == 0 or step == config.max_train_steps:
                losses.append(running.item() / ((step - 1) % LOSS_EVERY + 1))
                running.zero_()
                if not math.isfinite(losses[-1]):
                    raise UserError(f"the loss is no longer a number at step {step}; lower --learning-rate")
                bar.set_postfix(loss=f"{losses[-1]:.5f}", refresh=False)
                report({"loss": losses[-1], "learning_rate": schedule.get_last_lr()[0]}, step)
    if config.gradient_checkpointing:
        student.denoiser.disable_gradient_checkpointing()
    return losses


def _update(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")  # a skipped fp16 step is no mistake
        scaler.step(optimizer)
    scaler.update()
