"""The work of a run, known before it starts: samples of a batch, trajectories of the buffer, optimizer steps, NFE.

NFE, the number of function evaluations, counts samples that go through the denoiser; a backward pass counts as two.
All functions but `sampled` take options that `esd_peft.erasure.defaults.resolve` has filled in.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from esd_peft.models import ModelFamily
from esd_peft.options.training import BufferOptions, TrainingOptions
from esd_peft.prompts.augmentation import NEAR_WORDS, SHARING, Amounts, amounts, phrases
from esd_peft.prompts.plan import PromptPlan

LOOKED_AT = (0.2, 0.5)  # of a trajectory: where its x_t tell whether a candidate is a synonym
PROBE_TRAJECTORIES = 12  # of the teacher probe, and the steps of each
OWN_TRAJECTORIES = 3  # of each concept, where concepts are few
PROBE_STEPS = 10  # where no others are asked for
LOOKS = 5  # at --validation-prompt while it trains


@dataclass(frozen=True)
class BufferShape:
    """The contents of a full buffer."""

    concept_trajectories: int
    preserve_trajectories: int
    keep: int | None  # steps kept of each trajectory; none: all

    @property
    def trajectories(self) -> int:
        """The number of trajectories of both kinds."""
        return self.concept_trajectories + self.preserve_trajectories


def preservation_samples(training: TrainingOptions) -> int:
    """Return the number of preservation samples in a batch."""
    share, size = training.preservation_ratio, training.train_batch_size
    return max(int(share * size), min(1, size - 1)) if share else 0


def look_interval(training: TrainingOptions) -> int:
    """Optimizer steps between two looks at --validation-prompt."""
    return max(1, math.ceil(training.max_train_steps / LOOKS))


def buffer_shape(buffer: BufferOptions, training: TrainingOptions, preserved: int) -> BufferShape:
    """Return the buffer's shape, with one trajectory for each of `preserved` prompts.

    A buffer that is refreshed holds no more than is used up until then.
    """
    interval, num_preserve = buffer.buffer_refresh_interval, preservation_samples(training)
    preserved = preserved if num_preserve else 0
    if not interval:
        return BufferShape(buffer.trajectories, preserved, None)
    num_concept = training.train_batch_size - num_preserve
    trajectories = min(buffer.trajectories, num_concept * interval)
    return BufferShape(
        trajectories,
        min(preserved, math.ceil(num_preserve * interval / 2)),
        math.ceil(num_concept * interval / trajectories),
    )


def nfe_per_sample(gradient_checkpointing: bool) -> int:
    """NFE of a sample in an optimizer step: forward, backward (counted as two), and a second forward."""
    return 4 if gradient_checkpointing else 3


def sampled(buffer: BufferOptions, family: ModelFamily) -> BufferOptions:
    """`buffer` with the family's own steps and guidance where none are given."""
    return buffer.replace(
        num_inference_steps=buffer.num_inference_steps or family.num_inference_steps,
        guidance_scale=family.guidance_scale if buffer.guidance_scale is None else buffer.guidance_scale,
    )


def probe_trajectories(concepts: int) -> int:
    """Return the number of trajectories of the teacher probe."""
    return concepts * own_trajectories(concepts) + other_trajectories(concepts)


def probe_rollout(buffer: BufferOptions) -> BufferOptions:
    """The teacher probe's trajectories, which the teacher drives and which show the concept."""
    return buffer.replace(rollout="teacher")


def own_trajectories(concepts: int) -> int:
    """The probe's trajectories of each of so many concepts: along one alone some neighbours look like synonyms."""
    return max(2, min(OWN_TRAJECTORIES, PROBE_TRAJECTORIES // concepts))


def other_trajectories(concepts: int) -> int:
    """The probe's trajectories of other prompts than the concepts'."""
    return max(2, PROBE_TRAJECTORIES - concepts * own_trajectories(concepts))


def count_probe_nfe(buffer: BufferOptions, predictions: int, concepts: Sequence[str], size: Amounts) -> int:
    """NFE of the teacher probe, at most: where candidates are few it takes less."""
    number, each = len(concepts), own_trajectories(len(concepts))
    rollouts = buffer.num_inference_steps * (predictions * number * each + 2 * other_trajectories(number))
    sharing = sum(SHARING for concept in concepts if len(concept.split()) > 1)
    candidates = number * (NEAR_WORDS + phrases(size, number)) + sharing
    return rollouts + each * len(LOOKED_AT) * candidates


def buffer_fills(buffer: BufferOptions, training: TrainingOptions) -> int:
    """Return how often the buffer of the method `trajectories` is filled."""
    steps = training.max_train_steps
    return math.ceil(steps / (buffer.buffer_refresh_interval or steps)) if steps else 0


def count_nfe(buffer: BufferOptions, training: TrainingOptions, gradient_checkpointing: bool, prompts: PromptPlan) -> int:
    """NFE of a run, without images; about, where steps are kept at random."""
    predictions = prompts.predictions
    sample, samples = nfe_per_sample(gradient_checkpointing), training.max_train_steps * training.train_batch_size
    if training.method == "contrastive":
        return samples * sample
    if training.method == "trajectories":
        return _count_rollout_nfe(buffer, training, prompts) + samples * sample
    probe = count_probe_nfe(buffer, predictions, prompts.concepts, amounts(training.method))
    if training.method == "layers":
        return probe
    preserving = preservation_samples(training)  # of what erases the teacher is asked `predictions` times
    asked = predictions * (training.train_batch_size - preserving) + preserving
    return probe + training.max_train_steps * asked + samples * sample


def count_calls(buffer: BufferOptions, training: TrainingOptions, prompts: PromptPlan) -> Counter[str]:
    """Samples of a run by "part/call" (`PhaseProfiler.calls`) as far as trajectories and training go; like `count_nfe`."""
    steps, batch = training.max_train_steps, training.train_batch_size
    if not steps:
        return Counter()
    if training.method == "trajectories":
        rollouts = _count_rollout_nfe(buffer, training, prompts)
        return Counter({"trajectories/evaluation": rollouts, "training/training step": steps * batch})
    probe = count_probe_nfe(buffer, prompts.predictions, prompts.concepts, amounts(training.method))
    preserving = preservation_samples(training)
    asked = steps * (prompts.predictions * (batch - preserving) + preserving)
    if training.method == "layers":
        learning = {"layers/layer answer": asked, "layers/layer step": steps * batch}
    else:
        learning = {"training/evaluation": asked, "training/training step": steps * batch}
    return Counter({"trajectories/evaluation": probe} | learning)


def _count_rollout_nfe(buffer: BufferOptions, training: TrainingOptions, prompts: PromptPlan) -> int:
    """NFE of filling the buffer of the method `trajectories`, as often as that is done."""
    shape, steps = buffer_shape(buffer, training, len(prompts.preserve)), buffer.num_inference_steps
    predictions = prompts.predictions
    keep = min(shape.keep or steps, steps)
    # trajectories that lie side by side end with the last step that is kept of one of them, which is drawn at random
    together = keep * min(shape.trajectories, buffer.rollout_batch_size)
    last = steps if keep == steps else together * (steps + 1) / (together + 1)
    # a student's own two predictions up to there, and the teacher's at what is kept
    trajectory = last * predictions if buffer.rollout != "student" else 2 * (last - 1) + keep * predictions
    return round(buffer_fills(buffer, training) * shape.trajectories * trajectory)


def count_denoiser_calls(buffer: BufferOptions, training: TrainingOptions) -> int:
    """About how often the denoiser is run, forward or forward and backward, in whatever batches."""
    steps = training.max_train_steps
    if training.method == "contrastive":
        return steps
    if training.method != "trajectories":  # the denoiser and in each step the teacher; or the probe alone
        return 2 * buffer.num_inference_steps + (2 * steps if training.method == "denoiser" else 0)
    batches = math.ceil(buffer_shape(buffer, training, 0).concept_trajectories / buffer.rollout_batch_size)
    of_a_step = 2 if buffer.rollout == "student" else 1
    return steps + buffer_fills(buffer, training) * batches * buffer.num_inference_steps * of_a_step
