"""The training loop around the optimizer steps: resuming, checkpoints, signals, and the loss that is shown."""

import contextlib
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from pydantic import ConfigDict, TypeAdapter, with_config
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.errors import UserError
from esd_peft.runtime import distributed, interrupts
from esd_peft.training.batch import Batch, Source
from esd_peft.training.checkpoint import Checkpoints, fitting
from esd_peft.training.monitor import Monitor
from esd_peft.training.synonyms import to_texts
from esd_peft.training.trainer import Trainer

LOSS_EVERY = 10  # steps between readings of the loss: each one waits for the device


@dataclass
class TrainingLoop:
    """Deals out batches until all steps are taken.

    It goes on from what a run has left, if there is any, and leaves a checkpoint when one is due, and on Ctrl-C or a
    SIGTERM, which end it after the step at hand. Only the main process has `checkpoints`: it alone says when, and the others
    wait for it in the next step.
    """

    trainer: Trainer
    source: Source
    monitor: Monitor
    checkpoints: Checkpoints | None
    left: dict[str, Any] | None = None  # by a run that was stopped
    buffer: dict[str, Tensor] | None = None  # what that run's source had, if it is not damaged

    def batches(self) -> Generator[Batch, None, None]:
        """Yield batches. Train on each before asking for the next.

        Raises `UserError` if the loss is no longer a number, `KeyboardInterrupt` if the run was interrupted.
        """
        trainer = self.trainer
        if self.left is not None:
            with fitting():
                self._restore(self.left)
            self.left = self.buffer = None  # they may be large
        self.begun, shown = trainer.taken, distributed.is_main_process()
        self.monitor.look(trainer.taken)  # it is due yet if the run was interrupted after that step
        with (
            tqdm(total=trainer.steps, initial=trainer.taken, desc="train", disable=not shown) as bar,
            interrupts.noted() as signals,
        ):
            done = trainer.taken == trainer.steps
            while not done:
                spent, calls = trainer.profiler.nfe, Counter(trainer.profiler.calls)
                try:
                    batch = next(self.source)
                except interrupts.InterruptedBetweenSteps:  # while the buffer was filled or prompts were sought
                    # the run that goes on does that from its beginning
                    trainer.profiler.nfe, trainer.profiler.calls = spent, calls
                    self._save(interrupted=True)
                    self._stop()
                yield batch
                interrupted, done = self._look(bool(signals), bar)
                bar.update()
                if not done:
                    self._save(interrupted)
                    if interrupted:
                        self._stop()
            if self.checkpoints is not None and trainer.taken > self.begun:
                with contextlib.suppress(UserError):  # a disk too full for it may have room for the adapter
                    self._write(self.checkpoints, self._state(done=True), None)
            if distributed.any_process(bool(signals)):  # during the last step, or since
                self._stop()
        if trainer.student.denoiser.is_gradient_checkpointing:
            trainer.student.denoiser.disable_gradient_checkpointing()

    def _look(self, signalled: bool, bar: "tqdm[Any]") -> tuple[bool, bool]:
        """Return whether the run was interrupted, and whether it is done, after a step."""
        trainer = self.trainer
        interrupted = distributed.any_process(signalled)
        done = trainer.taken == trainer.steps
        if trainer.taken % LOSS_EVERY == 0 or done:
            self.monitor.log(trainer.read_loss(), trainer.taken)
            bar.set_postfix(loss=f"{trainer.losses[-1]:.5f}", refresh=False)
        if not interrupted:
            self.monitor.look(trainer.taken)
        return interrupted, done

    def _save(self, interrupted: bool) -> None:
        step = self.trainer.taken
        if self.checkpoints is not None and step > self.begun and (interrupted or self.checkpoints.is_due()):
            state = self._state()
            self._write(self.checkpoints, state, state["source"].pop("buffer"))

    def _write(self, checkpoints: Checkpoints, state: dict[str, Any], buffer: dict[str, Tensor] | None) -> None:
        checkpoints.save(self.trainer.taken, state, buffer)

    def _stop(self) -> NoReturn:
        distributed.any_process(True)  # nobody leaves before the checkpoint is there: the launcher then ends the others
        raise interrupts.ended(f"step {self.trainer.taken} of {self.trainer.steps}", kept=self.trainer.taken > 0)

    def _state(self, done: bool = False) -> dict[str, Any]:
        source = {"matches": to_texts(self.source.matches)} if done else self.source.state_dict()
        return self.trainer.state_dict(done) | {"source": source}

    def _restore(self, left: dict[str, Any]) -> None:
        state = cast(dict[str, Any], _STATE.validate_python(left))
        self.trainer.load_state_dict(state)
        if state["done"]:
            self.source.load_matches(state["source"]["matches"])
        else:
            self.source.load_state_dict(state["source"] | {"buffer": self.buffer})


@with_config(ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class _State(TypedDict):
    """The contents of a checkpoint."""

    step: int
    done: bool
    parameters: list[Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    scaler: dict[str, Any]
    losses: list[float]
    unread: list[tuple[Tensor, Tensor | None]]
    source: dict[str, Any]
    nfe: int
    calls: dict[str, int]
    training_samples: int


_STATE = TypeAdapter(_State)
