"""The methods. Each is a learner, a source of batches and a loss.

The first three learn the guided target; `contrastive` has its own loss and is here for comparison only.

| method | a sample is | the learner predicts | prompts |
|---|---|---|---|
| layers | hidden states at each cross-attention layer, of a few trajectories | one output a layer | many: contexts, synonyms, preservation |
| denoiser | x_t of the same trajectories | one output | the same |
| trajectories | x_t of the concepts' own trajectories, with the teacher's answers in the buffer | one output | the pair that drove it, --preserve |
| contrastive | noised images of the concept | one output | the concept |
"""  # noqa: E501

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from esd_peft.options.training import BufferOptions, TrainingOptions
from esd_peft.prompts.augmentation import PromptTable
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.devices import send
from esd_peft.runtime.seeds import generator
from esd_peft.training import contrastive
from esd_peft.training.batch import Source
from esd_peft.training.buffer import Buffer
from esd_peft.training.learners import PREDICTION, CrossAttention, Denoiser, HiddenStates, Learner, pairs_of_samples
from esd_peft.training.prompted_samples import Collected, PromptedSamples
from esd_peft.training.rollout import Rollout
from esd_peft.training.synonyms import SynonymMatch, TeacherProbe, probe_teacher
from esd_peft.training.target import WEIGHT_DECAY, Loss, guided_loss
from esd_peft.training.trajectory_samples import TrajectorySamples
from esd_peft.training.work import own_trajectories

MAX_GRAD_NORM = 1.0  # where a few samples can have large gradients


@dataclass
class Materials:
    """The inputs of a method."""

    rollout: Rollout
    pairs: PairTable
    prompts: PromptTable | None  # many prompts, for the methods that learn from them
    concepts: list[str]
    buffer: BufferOptions
    training: TrainingOptions


@dataclass
class Method:
    """A learner, its source of batches, and its loss."""

    learner: Learner
    source: Source
    loss: Loss = guided_loss
    weight_decay: float = WEIGHT_DECAY
    max_grad_norm: float | None = None  # gradients are clipped to it


def make_method(given: Materials) -> Method:
    """The method that the options name. Raises `UserError` if it does not fit the model."""
    return METHODS[given.training.method](given)


def _layers(given: Materials) -> Method:
    """Each cross-attention layer learns the target for its own output (`docs/attention.md`)."""
    learner, table, draws = CrossAttention(given.rollout.student), _many(given), generator(given.training.seed, "attention")

    def collect(known: Sequence[SynonymMatch], _: Buffer | None) -> Collected:
        states = HiddenStates(learner.layers, given.rollout.student.device)
        probe = probe_teacher(given.rollout, table, given.buffer, draws, states.watch, known)
        concepts, others = states.parts
        samples = {name: torch.cat([kept, others[name]]) for name, kept in concepts.items()}
        own, rest = (len(next(iter(part.values()))) for part in states.parts)
        pairs = pairs_of_samples(torch.arange(probe.own), given.buffer.rollout_batch_size, own)
        shown = torch.cat([probe.concept_of(pairs), torch.full((rest,), -1)])
        return Collected(samples, shown, probe.matches, {})

    at_once = 3 * given.training.train_batch_size  # a layer's answers are small
    return Method(learner, PromptedSamples(learner, given.rollout, table, given.training, collect, at_once, draws))


def _denoiser(given: Materials) -> Method:
    """The denoiser as a whole learns from the same prompts."""
    rollout, buffer = given.rollout, given.buffer
    learner, table, draws = Denoiser(rollout.student), _many(given), generator(given.training.seed, "bank")

    def collect(known: Sequence[SynonymMatch], kept: Buffer | None) -> Collected:
        if kept is not None:
            probe = TeacherProbe(kept, [*known], own_trajectories(len(known)))
        else:
            probe = probe_teacher(rollout, table, buffer, draws, known=known)
        there = probe.samples
        null, named = there.teacher[:, there.pairs < probe.own].float()
        sizes = {PREDICTION: send((named - null).square().mean(), rollout.student.device)}
        samples = {"inputs": there.inputs, "timesteps": there.timesteps}
        return Collected(samples, probe.concept_of(there.pairs), probe.matches, sizes, there)

    at_once = 2 * buffer.rollout_batch_size
    source = PromptedSamples(learner, rollout, table, given.training, collect, at_once, draws)
    return Method(learner, source, max_grad_norm=MAX_GRAD_NORM)


def _trajectories(given: Materials) -> Method:
    """The denoiser as a whole learns from the concepts' own trajectories, with the answers that these took anyway."""
    rollout, draws = given.rollout, generator(given.training.seed, "bank")
    source = TrajectorySamples(rollout, given.pairs, given.buffer, given.training, draws)
    return Method(Denoiser(rollout.student), source)


def _contrastive(given: Materials) -> Method:
    """Images of the concept are negative examples. The paper contains none of it (`docs/objectives.md`)."""
    rollout, training, draws = given.rollout, given.training, generator(given.training.seed, "bank")
    references = contrastive.make_references(rollout, given.concepts, training.seed, given.buffer.rollout_batch_size)
    source = contrastive.ReferenceSamples(rollout, given.pairs, references, training.train_batch_size, draws)
    return Method(Denoiser(rollout.student), source, contrastive.contrastive_loss, contrastive.WEIGHT_DECAY, MAX_GRAD_NORM)


METHODS: dict[str, Callable[[Materials], Method]] = {
    "layers": _layers, "denoiser": _denoiser, "trajectories": _trajectories, "contrastive": _contrastive,
}  # fmt: skip


def _many(given: Materials) -> PromptTable:
    assert given.prompts is not None, "the methods that learn from many prompts are given them"
    return given.prompts
