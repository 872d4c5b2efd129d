"""`--augment-prompts`: the denoiser as a whole learns from the wordings that cross-attention learns from layer by layer.

A trajectory of a prompt costs fifty evaluations of the denoiser; to ask the teacher for one more prompt at an x_t that is
known costs one. So a few trajectories are enough, the concepts' and others' (`survey`), and at their x_t each batch has
prompts of its own: the concept in random contexts and under other names, and words that hold the rest in place. SPM
(arXiv 2312.16145) holds words near to the concept at its x_t in this way.
"""

from typing import Any

import torch
from torch import Tensor

from esd_peft.models.family import PromptEmbeds, index_embeds
from esd_peft.prompts.wordings import Wordings
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import send
from esd_peft.training.batches import Batch, Sampler
from esd_peft.training.buffer import Buffer
from esd_peft.training.mixture import HOLD_WEIGHT, MixedPrompts, Mixture
from esd_peft.training.names import to_texts, to_verdicts
from esd_peft.training.options import BufferOptions, TrainingOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.survey import Survey, survey
from esd_peft.training.work import own_trajectories, preservation_samples


class AugmentedSampler(Sampler):
    """Batches of prompts, each at an x_t of one of the trajectories, with the teacher's predictions for them."""

    def __init__(
        self,
        rollout: Rollout,
        wordings: Wordings,
        buffer: BufferOptions,
        training: TrainingOptions,
        generator: torch.Generator,
    ) -> None:
        self.rollout, self.wordings, self.options, self.generator = rollout, wordings, buffer, generator
        self.holding = preservation_samples(training)
        self.erasing = training.train_batch_size - self.holding
        self.unprompted_guidance = training.unprompted_guidance
        self.taken = 0
        self.seen: Survey | None = None

    def __next__(self) -> Batch:
        seen = self.seen or self._begin()
        prompts = next(self.mixture)
        chosen = torch.randint(len(self.inside), (len(prompts.prompts),), generator=self.generator)
        self.taken += 1
        places = self.inside[chosen]
        samples = seen.samples.index(places, self.rollout.student.device)
        return self._batch(prompts, samples, seen.concept_of(seen.samples.pairs[places]) >= 0)

    def _begin(self) -> Survey:
        """Run the trajectories; if that is interrupted the sampler stands where it stood."""
        before = self.generator.get_state()
        try:
            with self.rollout.profiler.phase("rollout"):
                seen = self._look(survey(self.rollout, self.wordings, self.options, self.generator))
        except BaseException:
            self.generator.set_state(before)
            raise
        self.before = before
        return seen

    def _look(self, seen: Survey) -> Survey:
        self.seen, self.verdicts = seen, seen.verdicts
        self.inside = self.rollout.inside(seen.samples.timesteps, self.options).nonzero().squeeze(1)
        null, named = seen.samples.teacher[:, seen.samples.pairs < seen.own].float()
        self.size = (named - null).square().mean().item()
        self.mixture = Mixture(self.wordings, seen.verdicts, self.erasing, self.holding, self.generator)
        return seen

    def _batch(self, prompts: MixedPrompts, samples: Buffer, shows: Tensor) -> Batch:
        """The loss of each sample is a share of what the concept does, and `HOLD_WEIGHT` times that of what holds. `shows`
        says which samples are along a concept's trajectory, `[B]`."""
        count = len(prompts.prompts)
        erases, everywhere, device = torch.arange(count) < self.erasing, torch.arange(count), samples.timesteps.device
        erasing = everywhere[erases]
        asked = [(prompts.prompts, everywhere), (prompts.neutrals[erases], erasing)]
        asked += [(prompts.goals[erases], erasing)] if prompts.are_mapped else []
        named, *without = self._ask(samples, asked)
        null, goal = (torch.cat([answers, named[self.erasing :]]) for answers in (without[0], without[-1]))
        eta, weight = prompts.eta.clone(), torch.where(erases, 1.0, HOLD_WEIGHT) * prompts.weight / self.size
        pushed = ~erases & shows
        if self.unprompted_guidance and pushed.any():  # from its own prediction away from the concept
            eta[pushed] = self.unprompted_guidance
            pushing = send(pushed, device).view(-1, *[1] * (named.dim() - 1))
            null, named = (torch.where(pushing, x, y) for x, y in zip(samples.teacher, (null, named), strict=True))
        embeds = self._embeds(prompts.prompts, device)
        anchor = goal if prompts.are_mapped or self.unprompted_guidance else None
        pair, eta, weight = torch.cat([null, named]), send(eta, device), send(weight, device)
        return Batch(samples.inputs, samples.timesteps, embeds, pair, eta, weight, anchor, self.erasing)

    def _ask(self, samples: Buffer, asked: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The teacher's predictions for rows of the wordings, each at the sample beside it; zeros for samples that are
        another process's."""
        rows, where = (torch.cat(column) for column in zip(*asked, strict=True))
        student, device, own = self.rollout.student, samples.timesteps.device, distributed.share(len(samples))
        made = torch.zeros(len(rows), *samples.inputs.shape[1:], dtype=samples.inputs.dtype, device=device)
        ours = ((where >= own.start) & (where < own.stop)).nonzero().squeeze(1)
        with torch.no_grad(), student.teacher():
            for part in ours.split(2 * self.options.rollout_batch_size) if len(ours) else ():
                here, there = send(where[part], device), send(part, device)
                embeds = self._embeds(rows[part], device)
                made[there] = student.predict(samples.inputs[here], samples.timesteps[here], embeds).to(made.dtype)
        self.rollout.profiler.nfe += len(rows)
        return [*made.split([len(at) for _, at in asked])]

    def _embeds(self, rows: Tensor, device: torch.device) -> PromptEmbeds:
        return {name: send(value, device) for name, value in index_embeds(self.wordings.embeds, rows).items()}

    def state_dict(self) -> dict[str, Any]:
        """See `batches.Sampler`."""
        if self.seen is None:
            return {"taken": 0, "buffer": None}
        return {
            "taken": self.taken,
            "before": self.before,
            "generator": self.generator.get_state(),
            "verdicts": to_texts(self.seen.verdicts),
            "buffer": {**vars(self.seen.samples)},
        }

    def load_verdicts(self, texts: list[list[list[str]]]) -> None:
        """See `batches.Sampler`."""
        self.verdicts = to_verdicts(self.wordings, texts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `batches.Sampler`."""
        self.taken = int(state["taken"])
        if not self.taken:
            return
        self.before = state["before"]
        if state["buffer"] is None:
            self.generator.set_state(self.before)
            self._begin()
        else:
            verdicts = to_verdicts(self.wordings, state["verdicts"])
            self._look(Survey(Buffer(**state["buffer"]), verdicts, own_trajectories(len(verdicts))))
        self.generator.set_state(state["generator"])
