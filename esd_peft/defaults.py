"""Every default that depends on something: on other options, on the model, on the machine."""

import dataclasses

import torch

from esd_peft.config import EraseConfig
from esd_peft.models import ModelFamily
from esd_peft.prompts.options import PromptOptions
from esd_peft.prompts.plan import PromptPlan, plan_prompts, read_preserved
from esd_peft.runtime.devices import resolve_device, resolve_dtype
from esd_peft.runtime.seeds import generator
from esd_peft.training.contrastive import epochs_of_references
from esd_peft.training.options import BufferOptions, StudentOptions, TrainingOptions


def resolve(config: EraseConfig, family: ModelFamily) -> tuple[EraseConfig, PromptPlan]:
    """The config with a value for every option that was left out and that the run reads, and the prompts that it comes to.

    The result is what `config.yaml` and `result.json` hold: it says what really runs, and resolves to itself. Of a memory
    budget it knows nothing (`esd_peft.memory.planner`). Raises `UserError` for a device, a folder or a file that is not
    there, and for prompts that contradict each other.
    """
    prompts = _resolve_prompts(config.prompts, config.training, family)
    plan = plan_prompts(prompts, family.world, robust=config.training.robust > 0)
    plan = dataclasses.replace(plan, retain=_read_whole(plan.retain, family))
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.runtime.dtype, device)
    runtime = config.runtime.replace(device=str(device), dtype=str(dtype).removeprefix("torch."))
    student = _resolve_student(config.student, prompts, config.training)
    if config.training.objective == "esd":
        training = _resolve_training(config.training, student, prompts)
        buffer = _resolve_buffer(config.buffer, student, prompts, plan, family)
    else:
        training, buffer = _resolve_contrastive(config.training, len(prompts.concept)), config.buffer
    memory = config.memory.replace(per_device_batch_size=config.memory.per_device_batch_size or training.train_batch_size)
    if memory.offload:
        runtime = runtime.replace(compile="off")
    resolved = config.replace(
        prompts=prompts, student=student, buffer=buffer, training=training, memory=memory, runtime=runtime
    )
    return resolved, plan


def _read_whole(texts: list[str], family: ModelFamily) -> list[str]:
    """Those that the text encoder reads to the end: small ones know few words as a whole."""
    return [text for text, (count, most) in zip(texts, family.token_counts(texts), strict=True) if count <= most]


def _resolve_prompts(given: PromptOptions, training: TrainingOptions, family: ModelFamily) -> PromptOptions:
    """η is 1, or 0 where the concept is mapped to something: one that is mapped by itself says so itself."""
    preserved = [*read_preserved(given), *_draw_words(given, training.seed, family)]
    given = given.replace(preserve=list(dict.fromkeys(preserved)), preserve_file=None, preserve_words=0)
    if training.objective != "esd":  # it has no η
        return given
    eta = given.negative_guidance
    concepts = [
        c.model_copy(update={"negative_guidance": 0.0}) if eta is None and c.negative_guidance is None and c.map_to else c
        for c in given.concept
    ]
    eta = (0.0 if given.map_to else 1.0) if eta is None else eta
    return given.replace(concept=concepts, negative_guidance=eta)


def _draw_words(given: PromptOptions, seed: int, family: ModelFamily) -> list[str]:
    """Prompts of as many words as `given` asks for, or of all there are; none that names what is erased, or a part of it."""
    if not given.preserve_words:
        return []
    goals = [goal for goal in map(given.goal_of, given.concept) if goal]
    said = {word for name in [*given.concept_names, *goals] for word in name.lower().split()}
    words = [word for word in family.whole_words() if word not in said]
    drawn = torch.randperm(len(words), generator=generator(seed, "preserve words"))[: given.preserve_words]
    return [f"a {words[i]}" for i in drawn.tolist()]


def _resolve_student(given: StudentOptions, prompts: PromptOptions, training: TrainingOptions) -> StudentOptions:
    robust = training.robust > 0
    # a prompt that brings the concept back is given away by what the other layers make of it, too
    scope = given.scope or ("full" if robust else "esd-x-strict")
    # LoHa and LoKr have no factor that would take a projection; the other scopes have no layer that reads the prompt alone
    reads_prompt = given.adapter_type in ("lora", "none") and scope not in ("esd-u", "selfattn")
    null_space = given.null_space
    if null_space is None:
        # what of the concept lies within the protected subspace is what an attacker can still say
        null_space = 0.97 if robust else 0.99 if prompts.sources else 0.999
    rank = given.rank or min((16 if robust else 8) * len(prompts.concept), 64)
    if given.adapter_type == "none":
        rank = given.rank
    return given.replace(
        scope=scope,
        rank=rank,
        alpha=rank if given.alpha is None else given.alpha,
        null_space=null_space if reads_prompt else 0.0,
        closed_form=given.closed_form and reads_prompt and training.objective == "esd",
    )


def _is_quick(student: StudentOptions, prompts: PromptOptions) -> bool:
    """Whether few steps are enough: nothing else is in the way of what is to go."""
    return student.protected and not prompts.sources


def _resolve_training(given: TrainingOptions, student: StudentOptions, prompts: PromptOptions) -> TrainingOptions:
    """More steps at the slower learning rate, and to tell apart what is to go from what shares its words; with --robust all
    rounds together."""
    rounds, quick = given.robust, _is_quick(student, prompts)
    few = 20 + 20 * len(prompts.concept)
    ratio = given.preservation_ratio
    if ratio is None:
        ratio = 0.5 if rounds else 0.25 if prompts.sources else 0.125
    return given.replace(
        preservation_ratio=0.0 if given.train_batch_size == 1 else ratio,
        max_train_steps=given.max_train_steps or few * (1 + 2 * rounds if rounds else 1 if quick else 8),
        train_batch_size=given.train_batch_size or 8,
        # fast where the null space holds everything else in place: docs/scopes.md
        learning_rate=given.learning_rate or (1e-2 if student.protected else 1e-3),
    )


def _resolve_contrastive(given: TrainingOptions, concepts: int) -> TrainingOptions:
    training = given.replace(train_batch_size=given.train_batch_size or 32, learning_rate=given.learning_rate or 1e-4)
    steps = given.max_train_steps or epochs_of_references(training, concepts)
    return training.replace(max_train_steps=steps)


def _resolve_buffer(
    given: BufferOptions, student: StudentOptions, prompts: PromptOptions, plan: PromptPlan, family: ModelFamily
) -> BufferOptions:
    interval, preserved = given.buffer_refresh_interval, given.preservation_trajectories
    concepts = len(prompts.concept)
    return given.replace(
        trajectories=given.trajectories or (4 + 4 * concepts) * (1 if _is_quick(student, prompts) else 3),
        preservation_trajectories=len(plan.preserve) if preserved is None else preserved,
        num_inference_steps=given.num_inference_steps or family.num_inference_steps,
        guidance_scale=family.guidance_scale if given.guidance_scale is None else given.guidance_scale,
        buffer_refresh_interval=(0 if given.rollout == "teacher" else 25) if interval is None else interval,
    )
