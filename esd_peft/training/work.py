"""How much a run does, known before it starts: samples of a batch, trajectories of the buffer, optimizer steps, NFE.

NFE, the number of function evaluations, counts samples that go through the denoiser; a backward pass counts as two.
All functions but `sampled` take options that `esd_peft.defaults.resolve` has filled in.
"""

import itertools
import math
from dataclasses import dataclass

from esd_peft.models import ModelFamily
from esd_peft.prompts.wordings import NEAR_WORDS, Amounts, phrases
from esd_peft.training.options import BufferOptions, TrainingOptions

SEARCH_STEPS = 60  # of an adversarial round, in which its prompts are learned side by side
SEARCH_BATCH_SIZE = 8
LOOKED_AT = (0.2, 0.5)  # of a trajectory: where its x_t tell whether a candidate is another name
SURVEY_TRAJECTORIES = 12  # of the teacher, along which it is seen at work, and the steps of each
OWN_TRAJECTORIES = 3  # of each concept, where concepts are few
SURVEY_STEPS = 10
SEARCH_TRAJECTORIES = 4  # of the teacher, for each concept, along which they are learned


@dataclass(frozen=True)
class BufferShape:
    """What fills the buffer once."""

    concept_trajectories: int
    preserve_trajectories: int
    keep: int | None  # steps kept of each trajectory; none: all

    @property
    def trajectories(self) -> int:
        """Of both kinds."""
        return self.concept_trajectories + self.preserve_trajectories


def preservation_samples(training: TrainingOptions) -> int:
    """How many samples of a batch hold the student to the teacher."""
    share, size = training.preservation_ratio, training.train_batch_size
    return max(int(share * size), min(1, size - 1)) if share else 0


def buffer_shape(buffer: BufferOptions, training: TrainingOptions) -> BufferShape:
    """Of a buffer that is refreshed, no more than is used up until then."""
    interval, num_preserve = buffer.buffer_refresh_interval, preservation_samples(training)
    preserved = buffer.preservation_trajectories if num_preserve else 0
    if not interval:
        return BufferShape(buffer.trajectories, preserved, None)
    num_concept = training.train_batch_size - num_preserve
    trajectories = min(buffer.trajectories, num_concept * interval)
    return BufferShape(
        trajectories,
        min(preserved, math.ceil(num_preserve * interval / 2)),
        math.ceil(num_concept * interval / trajectories),
    )


def stages(training: TrainingOptions) -> list[int]:
    """Optimizer steps before the first adversarial round and after each one (of the latter twice as many), or all steps.

    Each stage has an optimizer of its own: Adam remembers the large gradients of the start for longer than a round, in which
    it would hardly move.
    """
    steps, rounds = training.max_train_steps, training.robust
    first = steps // (1 + 2 * rounds)
    parts = [first] + [2 * first] * rounds
    parts[-1] += steps - sum(parts)
    return parts


def stage_ends(training: TrainingOptions) -> list[int]:
    """The steps after which each stage ends."""
    return [*itertools.accumulate(stages(training))]


def nfe_per_sample(gradient_checkpointing: bool) -> int:
    """NFE of a sample in an optimizer step: forward, backward (counted as two), and a second forward."""
    return 4 if gradient_checkpointing else 3


def sampled(buffer: BufferOptions, family: ModelFamily) -> BufferOptions:
    """`buffer` with the family's own steps and guidance where none are given."""
    return buffer.replace(
        num_inference_steps=buffer.num_inference_steps or family.num_inference_steps,
        guidance_scale=family.guidance_scale if buffer.guidance_scale is None else buffer.guidance_scale,
    )


def survey_trajectories(concepts: int) -> int:
    """All of them."""
    return concepts * own_trajectories(concepts) + other_trajectories(concepts)


def survey_rollout(buffer: BufferOptions) -> BufferOptions:
    """The trajectories along which the teacher is seen at work."""
    steps = min(SURVEY_STEPS, buffer.num_inference_steps)
    everything = {"min_timestep": 0, "max_timestep": BufferOptions.model_fields["max_timestep"].default}
    return buffer.replace(rollout="teacher", guided_rollout_ratio=0.0, num_inference_steps=steps, **everything)


def own_trajectories(concepts: int) -> int:
    """Of each of so many concepts: along one alone some neighbours look like other names for it."""
    return max(2, min(OWN_TRAJECTORIES, SURVEY_TRAJECTORIES // concepts))


def other_trajectories(concepts: int) -> int:
    """Of the trajectories along which the teacher is seen at work, those of other prompts than the concepts'."""
    return max(2, SURVEY_TRAJECTORIES - concepts * own_trajectories(concepts))


def count_survey_nfe(buffer: BufferOptions, predictions: int, concepts: int, size: Amounts) -> int:
    """NFE of `esd_peft.training.survey`, at most: where candidates are few it takes less."""
    steps, own = survey_rollout(buffer).num_inference_steps, concepts * own_trajectories(concepts)
    rollouts = steps * (predictions * own + 2 * other_trajectories(concepts))
    return rollouts + own * len(LOOKED_AT) * (NEAR_WORDS + phrases(size, concepts))


def count_augmented_nfe(training: TrainingOptions, gradient_checkpointing: bool, predictions: int) -> int:
    """NFE of all steps with --augment-prompts: the teacher is asked in each, of what erases `predictions` times."""
    holding = preservation_samples(training)
    asked = predictions * (training.train_batch_size - holding) + holding
    return training.max_train_steps * (asked + training.train_batch_size * nfe_per_sample(gradient_checkpointing))


def buffer_fills(buffer: BufferOptions, training: TrainingOptions) -> int:
    """How often the buffer is filled in all."""
    return sum(math.ceil(steps / (buffer.buffer_refresh_interval or steps)) for steps in stages(training) if steps)


def count_nfe(
    buffer: BufferOptions, training: TrainingOptions, gradient_checkpointing: bool, predictions: int, concepts: int
) -> int:
    """NFE of a run with --objective esd, without early stopping and images; about, where steps are kept at random.

    `predictions` are the teacher's at each step of a trajectory: two, or three where a concept is mapped to something.
    """
    shape, steps = buffer_shape(buffer, training), buffer.num_inference_steps
    keep = min(shape.keep or steps, steps)
    # trajectories that lie side by side end with the last step that is kept of one of them, which is drawn at random
    together = keep * min(shape.trajectories, buffer.rollout_batch_size)
    last = steps if keep == steps else together * (steps + 1) / (together + 1)
    # a student's own two predictions up to there, and the teacher's at what is kept
    trajectory = last * predictions if buffer.rollout == "teacher" else 2 * (last - 1) + keep * predictions
    rollouts = round(buffer_fills(buffer, training) * shape.trajectories * trajectory)
    sample = nfe_per_sample(gradient_checkpointing)
    searching = SEARCH_TRAJECTORIES * steps * predictions + SEARCH_STEPS * sample * SEARCH_BATCH_SIZE
    optimizing = training.max_train_steps * training.train_batch_size * sample
    return rollouts + optimizing + training.robust * concepts * searching


def count_denoiser_calls(buffer: BufferOptions, training: TrainingOptions) -> int:
    """About how often the denoiser is run, forward or forward and backward, in whatever batches."""
    steps = training.max_train_steps
    if training.objective == "contrastive":
        return steps
    if training.augment_prompts:  # and in each step the teacher
        return 2 * steps + 2 * survey_rollout(buffer).num_inference_steps
    batches = math.ceil(buffer_shape(buffer, training).concept_trajectories / buffer.rollout_batch_size)
    of_a_step = 1 if buffer.rollout == "teacher" else 2
    return steps + buffer_fills(buffer, training) * batches * buffer.num_inference_steps * of_a_step
