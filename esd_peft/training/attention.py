"""Cross-attention learns the guided target layer by layer.

What a prompt c does to hidden states h it does in cross-attention. Let O(h, c) be what such a layer and the feed-forward
layer after it add to h. So what the denoiser is to do (eq. 6) can be asked of each layer by itself: where a prompt names the
concept

    O'(h, prompt) = O(h, goal) − η (O(h, prompt) − O(h, prompt without the concept))

and O'(h, w) = O(h, w) for every other prompt w, O being the teacher's layer, which answers for any prompt at the cost of
that layer alone. The denoiser runs only to collect some h, and to say which words are other names for the concept. So
thousands of prompts that nobody has listed hold the rest in place, where a trajectory of each would cost fifty evaluations
of the denoiser.

What shows without being named is in h already. With --unprompted-guidance η' the goal of every other prompt is
O(h, w) − η' (O(h, concept) − O(h, concept's prompt without it)) where h is of a trajectory of the concept.

UCE and MACE (arXiv 2308.14761, 2403.06135) ask the like of keys and values, token by token and in closed form. These are
linear in the prompt's tokens, in which a concept is hardly apart from what is near it. The softmax and the feed-forward
layer are not.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, with_config
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from esd_peft.errors import UserError
from esd_peft.prompts.wordings import Wordings
from esd_peft.runtime import distributed, interrupts
from esd_peft.runtime.seeds import generator
from esd_peft.training.checkpoint import Checkpoints, fitting
from esd_peft.training.esd import WEIGHT_DECAY
from esd_peft.training.layers import ERASE, HOLD, AttentionLayer, LayerLoss, LayerStates, pairs_of_samples
from esd_peft.training.mixture import Mixture
from esd_peft.training.monitor import Monitor
from esd_peft.training.names import Verdict, to_texts, to_verdicts
from esd_peft.training.options import BufferOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.survey import survey
from esd_peft.training.trainer import make_optimizer, restore

LORA_RATE, WEIGHTS_RATE = 3e-3, 1e-3
LOSS_EVERY = 50
CHECKPOINTS = 8  # of a stage: a step takes less than one of the denoiser as a whole


class AttentionTraining:
    """Trains the student's cross-attention for so many steps, which `monitor` is shown.

    `verdicts` are what the teacher says of words that are near the concepts; `losses` are means of every `LOSS_EVERY` steps,
    1 being what the concept does in the layers. Of several processes the main one trains, and the others take what it has
    learned.
    """

    def __init__(
        self,
        rollout: Rollout,
        wordings: Wordings,
        options: BufferOptions,
        steps: int,
        seed: int,
        monitor: Monitor,
        unprompted_guidance: float = 0.0,
    ) -> None:
        self.rollout, self.wordings, self.options, self.monitor = rollout, wordings, options, monitor
        self.steps, self.seed, self.unprompted_guidance = steps, seed, unprompted_guidance
        self.student = rollout.student
        self.taken = 0
        self.verdicts: list[Verdict] = []
        self.losses: list[float] = []
        self.recent: list[Tensor] = []  # each step's loss since the last mean

    def run(self, checkpoints: Checkpoints | None, left: dict[str, Any] | None = None) -> None:
        """Train; from where a run that was stopped has `left` it, if there is such. Only the main process has `checkpoints`.

        Raises `UserError` if the loss is no longer a number or what is left does not fit, `KeyboardInterrupt` if the run was
        interrupted: once the layers learn, after a step and with a checkpoint.
        """
        state: _State | None = None
        if left is not None:
            with fitting():
                state = _STATE.validate_python(left)
                self._restore(state)
        if self.taken == self.steps:
            return
        course = self._prepare()
        if state is not None and state["under_way"] is not None:
            self._go_on(course, state["under_way"])
        self.monitor.look(self.taken)  # it is due yet if the run was interrupted after that step
        with tqdm(total=self.steps, initial=self.taken, desc="attention") as bar, interrupts.noted() as signals:
            while self.taken < self.steps:
                if distributed.is_main_process():
                    self._train(course, bar, signals)
                self.taken = distributed.broadcast(self.taken)  # the others wait here
                interrupted = distributed.any_process(bool(signals))
                if checkpoints is not None and self.taken:
                    self._save(checkpoints, course, interrupted)
                if distributed.any_process(interrupted):  # nobody leaves before the checkpoint is there
                    raise interrupts.ended(f"step {self.taken} of {self.steps} of --attention-steps", kept=self.taken > 0)
                self.monitor.look(self.taken)
        if distributed.world_size() > 1:
            self.student.take(distributed.broadcast(p.detach().cpu()) for p in self.student.parameters)

    def _prepare(self) -> "_Course":
        """See the teacher draw, which is the same each time."""
        student, draws = self.student, generator(self.seed, "attention")
        blocks = student.family.cross_attention(student.denoiser)
        layers = {name: AttentionLayer(student.denoiser.get_submodule(name)) for name in blocks}
        states = LayerStates(layers)
        seen = survey(self.rollout, self.wordings, self.options, draws, states.watch)
        self.verdicts = self.verdicts or seen.verdicts
        named, others = states.parts
        hidden = {name: torch.cat([kept, others[name]]) for name, kept in named.items()}
        known, unknown = (len(next(iter(part.values()))) for part in states.parts)
        pairs = pairs_of_samples(torch.arange(seen.own), self.options.rollout_batch_size, known)
        shown = torch.cat([seen.concept_of(pairs), torch.full((unknown,), -1)])
        mixture = Mixture(self.wordings, self.verdicts, ERASE, HOLD, draws)
        loss_of = LayerLoss(student, layers, hidden, shown, self.wordings, draws, self.unprompted_guidance)
        rate = WEIGHTS_RATE if student.mixed_precision else LORA_RATE
        optimizer = make_optimizer("AdamW", loss_of.parameters, rate, WEIGHT_DECAY)
        return _Course(loss_of, mixture, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps))

    def _go_on(self, course: "_Course", left: "_UnderWay") -> None:
        """Let the course stand where what is `left` stood."""
        with fitting():
            restore(course.optimizer, course.schedule, left)
            course.loss_of.draws.set_state(left["draws"])
            course.loss_of.sizes = {name: size.to(self.student.device) for name, size in left["sizes"].items()}
        self.rollout.profiler.nfe = left["nfe"]

    def _train(self, course: "_Course", bar: "tqdm[Any]", signals: list[int]) -> None:
        """Up to where a checkpoint is due, or a signal has come."""
        part = -(-self.steps // CHECKPOINTS)
        while not signals:
            loss = course.loss_of(next(course.mixture))
            loss.backward()
            course.optimizer.step()
            course.optimizer.zero_grad(set_to_none=True)
            course.schedule.step()
            self.student.project()
            self.taken += 1
            self._note(loss.detach(), bar)
            if self.taken == self.steps or self.taken % part == 0:
                break
            if not signals:
                self.monitor.look(self.taken)

    def _save(self, checkpoints: Checkpoints, course: "_Course", interrupted: bool) -> None:
        under_way: _UnderWay = {
            "parameters": [p.detach() for p in self.student.parameters],
            "optimizer": course.optimizer.state_dict(),
            "schedule": course.schedule.state_dict(),
            "draws": course.loss_of.draws.get_state(),
            "sizes": course.loss_of.sizes,
            "recent": self.recent,
            "nfe": self.rollout.profiler.nfe,
        }
        done = self.taken == self.steps and not interrupted
        with contextlib.suppress(*([UserError] if done else [])):  # a disk too full for it may have room for the adapter
            checkpoints.save(self.taken, self.state_dict() | {"under_way": under_way})

    def _note(self, loss: Tensor, bar: "tqdm[Any]") -> None:
        """Of a step."""
        self.recent.append(loss)
        bar.update()
        if self.taken % LOSS_EVERY and self.taken < self.steps:
            return
        self.losses.append(torch.stack(self.recent).mean().item())
        self.recent = []
        if not math.isfinite(self.losses[-1]):
            raise UserError(f"the loss is no longer a number at step {self.taken} of --attention-steps; use --dtype float32")
        self.monitor.log({"attention_loss": self.losses[-1]}, self.taken)
        bar.set_postfix(loss=f"{self.losses[-1]:.4f}", refresh=False)

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints hold of it once it is done."""
        return {"step": self.taken, "verdicts": to_texts(self.verdicts), "losses": self.losses, "under_way": None}

    def _restore(self, state: "_State") -> None:
        if not 0 < state["step"] <= self.steps:
            raise ValueError(f"step {state['step']} of {self.steps}")
        self.taken, self.losses = state["step"], state["losses"]
        self.verdicts = to_verdicts(self.wordings, state["verdicts"])
        if left := state["under_way"]:
            self.student.take(left["parameters"])
            self.recent = [loss.to(self.student.device) for loss in left["recent"]]
            self.rollout.profiler.nfe = left["nfe"]
        elif self.taken < self.steps:
            raise ValueError("what it had come to is missing")


@dataclass
class _Course:
    """What a step takes."""

    loss_of: LayerLoss
    mixture: Mixture
    optimizer: Optimizer
    schedule: LRScheduler


@with_config(ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class _UnderWay(TypedDict):
    """What the layers have learned so far, and what the next step needs."""

    parameters: list[Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    draws: Tensor
    sizes: dict[str, Tensor]
    recent: list[Tensor]
    nfe: int


@with_config(ConfigDict(arbitrary_types_allowed=True, extra="forbid"))
class _State(TypedDict):
    """What a checkpoint holds of it."""

    step: int
    verdicts: list[list[list[str]]]
    losses: list[float]
    under_way: _UnderWay | None  # none once training goes on after it: the parameters are that one's


_STATE = TypeAdapter(_State)
