"""Every default that depends on something: on other options, on the model, on the machine."""

import math

from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.evaluation.options import ValidationOptions
from esd_peft.models import ModelFamily
from esd_peft.options import Options, flag
from esd_peft.prompts.options import PromptOptions
from esd_peft.prompts.plan import PromptPlan, plan_prompts, read_preserved
from esd_peft.prompts.wordings import MANY_WORDS
from esd_peft.runtime.devices import resolve_device, resolve_dtype
from esd_peft.training.contrastive import epochs_of_references
from esd_peft.training.options import BufferOptions, StudentOptions, TrainingOptions
from esd_peft.training.work import preservation_samples, sampled

# what nothing reads where cross-attention learns layer by layer and no batches are trained on
_OF_BATCHES: dict[type[Options], tuple[str, ...]] = {
    TrainingOptions: (
        "robust", "stop_at", "learning_rate", "lr_scheduler", "lr_warmup_steps", "optimizer", "max_grad_norm",
        "train_batch_size", "preservation_ratio", "snr_gamma",
    ),
    BufferOptions: (
        "rollout", "trajectories", "preservation_trajectories", "guided_rollout_ratio", "buffer_refresh_interval",
        "min_timestep", "max_timestep",
    ),
}  # fmt: skip


def resolve(config: EraseConfig, family: ModelFamily) -> tuple[EraseConfig, PromptPlan]:
    """The config with a value for every option that was left out and that the run reads, and the prompts that it comes to.

    The result is what `config.yaml` and `result.json` hold: it says what really runs, and resolves to itself. Of a memory
    budget it knows nothing (`esd_peft.memory.planner`). Raises `UserError` for a device, a folder or a file that is not
    there, and for prompts that contradict each other.
    """
    steps, augmented = _attention_steps(config, family), _augments(config, family)
    prompts = _resolve_prompts(config.prompts, config.training, steps > 0 or augmented)
    plan = plan_prompts(prompts, family.world, robust=config.training.robust > 0)
    plan = plan.read_by(family.read_whole)
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.runtime.dtype, device)
    runtime = config.runtime.replace(device=str(device), dtype=str(dtype).removeprefix("torch."))
    training = config.training.replace(augment_prompts=augmented)
    student = _resolve_student(config.student, prompts, training, steps)
    if config.training.objective == "esd":
        training = _resolve_training(training, student, prompts)
        buffer = _resolve_buffer(config.buffer, student, prompts, plan, family)
        if student.attention_steps and not training.max_train_steps:
            usual = _resolve_training(TrainingOptions(augment_prompts=augmented), student, prompts)
            _refuse_unread(training, usual)
            _refuse_unread(buffer, _resolve_buffer(BufferOptions(), student, prompts, plan, family))
    else:
        training, buffer = _resolve_contrastive(training, len(prompts.concept)), config.buffer
    if training.unprompted_guidance and not (student.attention_steps or preservation_samples(training)):
        raise UserError("--unprompted-guidance needs preservation samples; raise --preservation-ratio or leave it out")
    if training.augment_prompts and not preservation_samples(training):
        raise UserError("--augment-prompts needs samples that hold; raise --preservation-ratio or --train-batch-size")
    validation = _resolve_validation(config.validation, student.attention_steps + training.max_train_steps)
    memory = config.memory.replace(per_device_batch_size=config.memory.per_device_batch_size or training.train_batch_size)
    if memory.offload:
        runtime = runtime.replace(compile="off")
    resolved = config.replace(
        prompts=prompts,
        student=student,
        buffer=buffer,
        training=training,
        memory=memory,
        runtime=runtime,
        validation=validation,
    )
    return resolved, plan


def _refuse_unread(given: Options, usual: Options) -> None:
    """`given` may say what it would be anyway, as the config of a run that was does."""
    for name in _OF_BATCHES[type(given)]:
        if getattr(given, name) != getattr(usual, name):
            raise UserError(
                f"{flag(name)} is for training steps, and this run has none: cross-attention learns layer by layer; "
                "leave it out, add --max-train-steps for some after that, or --attention-steps 0 for these alone"
            )


def _attention_steps(config: EraseConfig, family: ModelFamily) -> int:
    """Where cross-attention can learn by itself, and the tokenizer knows words that hold the rest in place."""
    if config.student.attention_steps is not None:
        return config.student.attention_steps
    if config.training.augment_prompts or not (family.has_cross_attention and _learns_from_words(config, family)):
        return 0
    return 600 + 200 * len(config.prompts.concept)


def _augments(config: EraseConfig, family: ModelFamily) -> bool:
    """Where cross-attention cannot learn by itself."""
    buffer, training = config.buffer, config.training
    if training.augment_prompts is not None:
        return training.augment_prompts
    given = (buffer.trajectories, buffer.preservation_trajectories, buffer.buffer_refresh_interval)
    as_usual = buffer.rollout == "teacher" and all(value is None for value in given) and training.max_train_steps != 0
    as_usual = as_usual and training.preservation_ratio != 0 and training.train_batch_size != 1
    return as_usual and not family.has_cross_attention and _learns_from_words(config, family)


def _learns_from_words(config: EraseConfig, family: ModelFamily) -> bool:
    """Whether the tokenizer knows enough of them, and nothing else is asked for."""
    student, training = config.student, config.training
    as_usual = training.objective == "esd" and not (training.robust or training.stop_at is not None or student.null_space)
    in_scope = student.scope in (None, "esd-x", "esd-x-ff", "full") and student.adapter_type in ("lora", "none")
    as_usual = as_usual and in_scope and student.closed_form is None
    return as_usual and len(family.whole_words()) >= MANY_WORDS


def _resolve_prompts(given: PromptOptions, training: TrainingOptions, by_words: bool) -> PromptOptions:
    """η is 1, or less where the concept is mapped to something: one that is mapped by itself says so itself.

    In many contexts at η 0 a concept still shows where a prompt says more, and at 1 it becomes other things, too.
    """
    given = given.replace(preserve=read_preserved(given), preserve_file=None)
    if training.objective != "esd":  # it has no η
        return given
    eta, mapped = given.negative_guidance, 0.5 if by_words else 0.0
    concepts = [
        c.model_copy(update={"negative_guidance": mapped}) if eta is None and c.negative_guidance is None and c.map_to else c
        for c in given.concept
    ]
    eta = (mapped if given.map_to else 1.0) if eta is None else eta
    return given.replace(concept=concepts, negative_guidance=eta)


def _resolve_student(
    given: StudentOptions, prompts: PromptOptions, training: TrainingOptions, attention_steps: int
) -> StudentOptions:
    robust, by_words = training.robust > 0, attention_steps > 0 or bool(training.augment_prompts)
    # a prompt that brings the concept back is given away by what the other layers make of it, too
    # and what no prompt names by all but those that read it (the paper's ESD-u)
    unprompted = training.unprompted_guidance > 0 and not (given.null_space or given.closed_form)
    scope = given.scope or ("full" if robust else "esd-x-ff" if by_words else "esd-u" if unprompted else "esd-x-strict")
    # LoHa and LoKr have no factor that would take a projection; the other scopes have no layer that reads the prompt alone
    reads_prompt = given.adapter_type in ("lora", "none") and scope not in ("esd-u", "selfattn")
    null_space = given.null_space
    if null_space is None:
        # what of the concept lies within the protected subspace is what an attacker can still say
        null_space = 0.0 if by_words else 0.97 if robust else 0.99 if prompts.sources else 0.999
    closed_form = not by_words if given.closed_form is None else given.closed_form
    rank = given.rank or min((16 if robust or by_words else 8) * len(prompts.concept), 64)
    if given.adapter_type == "none":
        rank = given.rank
    return given.replace(
        scope=scope,
        attention_steps=attention_steps,
        rank=rank,
        alpha=float(rank) if given.alpha is None and rank is not None else given.alpha,  # as config.yaml reads it
        null_space=null_space if reads_prompt else 0.0,
        closed_form=closed_form and reads_prompt and training.objective == "esd",
    )


def _is_quick(student: StudentOptions, prompts: PromptOptions) -> bool:
    """Whether few steps are enough: nothing else is in the way of what is to go."""
    return student.protected and not prompts.sources


def _resolve_training(given: TrainingOptions, student: StudentOptions, prompts: PromptOptions) -> TrainingOptions:
    """More steps at the slower learning rate, and to tell apart what is to go from what shares its words; with --robust all
    rounds together."""
    rounds, quick, augmented = given.robust, _is_quick(student, prompts), given.augment_prompts
    few = 80 + 80 * len(prompts.concept) if augmented else 20 + 20 * len(prompts.concept)
    ratio = given.preservation_ratio
    if ratio is None:
        ratio = 1 / 3 if augmented else 0.5 if rounds else 0.25 if prompts.sources else 0.125
    steps = given.max_train_steps
    if steps is None:
        steps = 0 if student.attention_steps else few * (1 + 2 * rounds if rounds else 1 if quick or augmented else 8)
    # fast where the null space holds everything else in place (docs/scopes.md), or words do
    rate = 1e-2 if student.protected else 3e-3 if augmented and student.adapter_type != "none" else 1e-3
    return given.replace(
        preservation_ratio=0.0 if given.train_batch_size == 1 else ratio,
        max_train_steps=steps,
        train_batch_size=given.train_batch_size or (12 if augmented else 8),
        learning_rate=given.learning_rate or rate,
    )


def _resolve_contrastive(given: TrainingOptions, concepts: int) -> TrainingOptions:
    training = given.replace(train_batch_size=given.train_batch_size or 32, learning_rate=given.learning_rate or 1e-4)
    steps = epochs_of_references(training, concepts) if given.max_train_steps is None else given.max_train_steps
    return training.replace(max_train_steps=steps)


def _resolve_validation(given: ValidationOptions, steps: int) -> ValidationOptions:
    if not given.validation_prompt:  # nothing to look at
        return given
    return given.replace(validation_steps=given.validation_steps or max(1, math.ceil(steps / 5)))


def _resolve_buffer(
    given: BufferOptions, student: StudentOptions, prompts: PromptOptions, plan: PromptPlan, family: ModelFamily
) -> BufferOptions:
    interval, preserved = given.buffer_refresh_interval, given.preservation_trajectories
    concepts = len(prompts.concept)
    return sampled(given, family).replace(
        trajectories=given.trajectories or (4 + 4 * concepts) * (1 if _is_quick(student, prompts) else 3),
        preservation_trajectories=len(plan.preserve) if preserved is None else preserved,
        buffer_refresh_interval=(0 if given.rollout == "teacher" else 25) if interval is None else interval,
    )
