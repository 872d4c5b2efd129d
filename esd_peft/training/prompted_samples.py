"""Many prompts at few samples: what the methods `layers` and `denoiser` learn from.

A trajectory for one more prompt costs fifty denoiser evaluations; one more prompt at a known x_t costs one, and at a layer's
known hidden states only that layer. So the teacher denoises a few trajectories, those of the concepts and some others
(`synonyms.probe_teacher`), and each batch has prompts of its own at their samples: the concept in random contexts and as its
synonyms, and words that preserve everything else. SPM (arXiv 2312.16145) preserves words near the concept in this way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esd_peft.models.family import PromptEmbeds, index_embeds
from esd_peft.options.training import TrainingOptions
from esd_peft.prompts.augmentation import PromptTable
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import send
from esd_peft.training.batch import Batch, Source
from esd_peft.training.buffer import Buffer
from esd_peft.training.learners import Learner, Outputs, Samples
from esd_peft.training.prompt_sampler import PRESERVATION_WEIGHT, PromptBatch, PromptSampler
from esd_peft.training.rollout import Rollout
from esd_peft.training.synonyms import SynonymMatch, to_matches, to_texts
from esd_peft.training.work import preservation_samples


@dataclass
class Collected:
    """The samples of a few trajectories, in host memory."""

    samples: Samples  # [samples, ...] each
    shown: Tensor  # [samples] int64, the concept along whose trajectory each lies; −1: none
    matches: list[SynonymMatch]  # of each concept
    sizes: Outputs  # [] each: the mean square of what the concept does; an output that is missing is measured on a batch
    buffer: Buffer | None = None  # what a checkpoint keeps, if anything


# What collects them. It is told the matches that are known already, and what a checkpoint has kept.
Collect = Callable[[Sequence[SynonymMatch], Buffer | None], Collected]
Asked = dict[str, tuple[Tensor, Tensor]]  # rows of the prompt table, and for each the place of its sample in the batch


class PromptedSamples(Source):
    """Batches of prompts, each at one of the collected samples, with the teacher's answers for them.

    `at_once` is how many prompts the teacher is asked in one call, `draws` the source of all randomness, that of `collect`
    included.
    """

    def __init__(
        self,
        learner: Learner,
        rollout: Rollout,
        table: PromptTable,
        training: TrainingOptions,
        collect: Collect,
        at_once: int,
        draws: torch.Generator,
    ) -> None:
        self.learner, self.rollout, self.table, self.draws = learner, rollout, table, draws
        self.collect, self.at_once = collect, at_once
        self.erasing = training.train_batch_size - preservation_samples(training)
        self.preserving = preservation_samples(training)
        self.unprompted_guidance = training.unprompted_guidance
        plain = [pairs[0] for pairs in table.plain]
        self.named, self.neutral = table.index(p.prompt for p in plain), table.index(p.neutral for p in plain)
        self.taken = 0
        self.collected: Collected | None = None

    def __next__(self) -> Batch:
        there = self.collected or self._begin()
        prompts = next(self.prompts)
        chosen = torch.randint(len(there.shown), (len(prompts.prompts),), generator=self.draws)
        self.taken += 1
        return self._batch(there, prompts, chosen)

    def _begin(self, known: Sequence[SynonymMatch] = (), buffer: Buffer | None = None) -> Collected:
        """Collect the samples; if that is interrupted the source stands where it stood."""
        before = self.draws.get_state()
        try:
            with self.rollout.profiler.phase("rollout"):
                there = self.collect(known, buffer)
        except BaseException:
            self.draws.set_state(before)
            raise
        self.before, self.collected, self.matches, self.sizes = before, there, there.matches, {**there.sizes}
        self.prompts = PromptSampler(self.table, there.matches, self.erasing, self.preserving, self.draws)
        return there

    def _batch(self, there: Collected, prompts: PromptBatch, places: Tensor) -> Batch:
        """Ask the teacher for all that the targets need.

        A preservation prompt's target is the teacher's own answer; with --unprompted-guidance it is guided away from the
        concept at samples that show one.
        """
        device, everywhere, shown = self.learner.student.device, torch.arange(len(places)), there.shown[places]
        samples = {name: send(value[places], device) for name, value in there.samples.items()}
        erasing, preserving = everywhere[: self.erasing], everywhere[self.erasing :]
        pushed = preserving[shown[preserving] >= 0] if self.unprompted_guidance else preserving[:0]
        asked = {"named": (prompts.prompts, everywhere), "null": (prompts.neutrals[erasing], erasing)}
        asked |= {"goal": (prompts.goals[erasing], erasing)} if prompts.are_mapped else {}
        asked |= {"shown": (self.named[shown[pushed]], pushed), "without": (self.neutral[shown[pushed]], pushed)}
        eta, weight = prompts.eta.clone(), prompts.weight.clone()
        eta[pushed] = self.unprompted_guidance
        weight[preserving] *= PRESERVATION_WEIGHT
        pushed, anchored = send(pushed, device), prompts.are_mapped or len(pushed) > 0
        teacher, anchor = Outputs(), Outputs()
        for name, answer in self._ask(samples, asked).items():
            named, preserved = answer["named"], answer["named"][self.erasing :]
            null = torch.cat([answer["null"], preserved])
            goal = torch.cat([answer["goal"], preserved]) if prompts.are_mapped else null
            if name not in self.sizes:
                self.sizes[name] = (named[: self.erasing] - answer["null"]).float().square().mean()
            if len(pushed):
                named, null = named.index_copy(0, pushed, answer["shown"]), null.index_copy(0, pushed, answer["without"])
            teacher[name] = torch.cat([null, named])
            anchor |= {name: goal} if anchored else {}
        embeds, eta, weight = self._embeds(prompts.prompts), send(eta, device), send(weight, device)
        return Batch(samples, embeds, teacher, eta, weight, anchor or None, self.sizes, self.erasing)

    @torch.no_grad()
    def _ask(self, samples: Samples, asked: Asked) -> dict[str, Outputs]:
        """The teacher's answers by output and by what is asked; zeros at the samples of other processes.

        Sizes that are not known yet are measured on all of a batch, by each process for itself.
        """
        rows, where = (torch.cat(column) for column in zip(*asked.values(), strict=True))
        device, count = self.learner.student.device, len(next(iter(samples.values())))
        own = distributed.share(count) if self.sizes else range(count)
        ours = ((where >= own.start) & (where < own.stop)).nonzero().squeeze(1)
        made = Outputs()
        with self.learner.student.teacher():
            for part in ours.split(self.at_once) if len(ours) else ():
                here = send(where[part], device)
                some = {name: value[here] for name, value in samples.items()}
                for name, output in self.learner.predict(some, self._embeds(rows[part])).items():
                    if name not in made:
                        made[name] = output.new_zeros(len(rows), *output.shape[1:])
                    made[name][send(part, device)] = output
        self.rollout.profiler.nfe += self.learner.evaluations * len(rows)
        self.rollout.profiler.count(self.learner.part, {self.learner.answer: len(rows)})
        counts = [len(at) for _, at in asked.values()]
        return {name: dict(zip(asked, output.split(counts), strict=True)) for name, output in made.items()}

    def _embeds(self, rows: Tensor) -> PromptEmbeds:
        device = self.learner.student.device
        return {name: send(value, device) for name, value in index_embeds(self.table.embeds, rows).items()}

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        if self.collected is None:
            return {"taken": 0, "buffer": None}
        kept = self.collected.buffer
        return {
            "taken": self.taken,
            "before": self.before,
            "generator": self.draws.get_state(),
            "matches": to_texts(self.matches),
            "sizes": self.sizes,
            "buffer": None if kept is None else {**vars(kept)},
        }

    def load_matches(self, texts: list[list[list[str]]]) -> None:
        """See `Source`."""
        self.matches = to_matches(self.table, texts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`. Samples that no checkpoint keeps are collected anew, and are the same."""
        self.taken = int(state["taken"])
        if not self.taken:
            return
        self.draws.set_state(state["before"])
        buffer = None if state["buffer"] is None else Buffer(**state["buffer"])
        with self.rollout.profiler.uncounted():
            self._begin(to_matches(self.table, state["matches"]), buffer)
        self.sizes = {name: size.to(self.learner.student.device) for name, size in state["sizes"].items()}
        self.draws.set_state(state["generator"])
