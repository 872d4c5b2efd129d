"""Defaults that depend on the method, on other options, on the model or on the machine."""

from esd_peft.errors import UserError
from esd_peft.models import ModelFamily
from esd_peft.options.base import flag
from esd_peft.options.erase import EraseConfig
from esd_peft.options.prompts import PromptOptions
from esd_peft.options.training import BY_PROMPTS, BufferOptions, StudentOptions, TrainingOptions
from esd_peft.prompts.augmentation import MANY_WORDS
from esd_peft.prompts.plan import PromptPlan, plan_prompts, preserved_prompts
from esd_peft.runtime.devices import resolve_device, resolve_dtype
from esd_peft.training.contrastive import epochs_of_references
from esd_peft.training.work import PROBE_STEPS, preservation_samples, sampled


def resolve(config: EraseConfig, family: ModelFamily) -> tuple[EraseConfig, PromptPlan]:
    """The config with a value for every option that was left out and that the method reads, and the prompts of the run.

    The result is what `config.yaml` and `result.json` hold: it says what really runs, and resolves to itself. The memory
    budget is planned for later (`esd_peft.erasure.planner`). Raises `UserError` for an option that the method does not read,
    for a device, a folder or a file that is not there, and for prompts that contradict each other.
    """
    method = config.training.method or default_method(family)
    _check_method(config, family, method)
    prompts = _resolve_prompts(config.prompts, method)
    plan = plan_prompts(prompts, family.world).untruncated(family.read_whole)
    device = resolve_device(config.runtime.device)
    dtype = resolve_dtype(config.runtime.dtype, device)
    runtime = config.runtime.replace(device=str(device), dtype=str(dtype).removeprefix("torch."))
    training = config.training.replace(method=method, unprompted_guidance=config.training.unprompted_guidance or 0.0)
    student = _resolve_student(config.student, prompts, training)
    if method == "contrastive":
        training, buffer = _resolve_contrastive(config.training, len(prompts.concept)), config.buffer
    else:
        training = _resolve_training(training, student, prompts)
        buffer = _resolve_buffer(config.buffer, method, student, prompts, family)
        if method in BY_PROMPTS and not preservation_samples(training):
            raise UserError(f"--method {method} has to preserve; raise --preservation-ratio or --train-batch-size")
        if training.unprompted_guidance and not preservation_samples(training):
            raise UserError("--unprompted-guidance needs preservation samples; raise --preservation-ratio or leave it out")
    if training.max_train_steps == 0 and not student.closed_form:
        raise UserError("--max-train-steps 0 needs --method trajectories with --closed-form True; train for 1 or more")
    memory = config.memory.replace(
        per_device_batch_size=config.memory.per_device_batch_size or training.train_batch_size,
        gradient_checkpointing=config.memory.gradient_checkpointing or config.memory.offload,
    )
    resolved = config.replace(
        prompts=prompts,
        student=student,
        buffer=buffer,
        training=training,
        memory=memory,
        runtime=runtime.replace(compile="off") if memory.offload or method == "layers" else runtime,
    )
    return resolved, plan


def default_method(family: ModelFamily) -> str:
    """The method where none is named, which depends on the model alone.

    Many prompts are made of words of the tokenizer; layers learn by themselves where cross-attention is apart from all else.
    """
    if len(family.whole_words()) < MANY_WORDS:
        return "trajectories"
    return "layers" if family.has_cross_attention else "denoiser"


def _check_method(config: EraseConfig, family: ModelFamily, method: str) -> None:
    """Raise `UserError` for options that the method does not read, and for a model that has not what it needs."""
    for name, known in config.unread(method):
        named = " or ".join(f"--method {other}" for other in known)
        raise UserError(f"{flag(name)} is not read by --method {method}; leave it out, or add {named}")
    if method == "layers" and not family.has_cross_attention:
        raise UserError(f"--method layers needs separable cross-attention, which {family.path} lacks; use --method denoiser")
    if method == "layers" and config.student.scope in ("esd-u", "selfattn"):
        raise UserError(
            f"--scope {config.student.scope} has no cross-attention, which --method layers trains; use --method denoiser"
        )
    if method == "layers" and config.runtime.compile == "on":
        raise UserError("--compile on compiles whole blocks, which --method layers does not run; leave it out")
    if method in BY_PROMPTS and not family.whole_words():
        raise UserError(
            f"--method {method} preserves by words, and the tokenizer knows none as a whole; use --method trajectories"
        )


def _resolve_prompts(given: PromptOptions, method: str) -> PromptOptions:
    """η is 1, or less where the concept is mapped to something: one that is mapped by itself says so itself.

    In many contexts at η 0 a concept still shows where a prompt says more, and at 1 it becomes other things, too.
    """
    given = given.replace(preserve=preserved_prompts(given))
    if method == "contrastive":  # it has no η
        return given
    eta, mapped = given.negative_guidance, 0.5 if method in BY_PROMPTS else 0.0
    concepts = [
        c.model_copy(update={"negative_guidance": mapped}) if eta is None and c.negative_guidance is None and c.map_to else c
        for c in given.concept
    ]
    eta = (mapped if given.map_to else 1.0) if eta is None else eta
    return given.replace(concept=concepts, negative_guidance=eta)


def _resolve_student(given: StudentOptions, prompts: PromptOptions, training: TrainingOptions) -> StudentOptions:
    by_prompts, from_pairs = training.method in BY_PROMPTS, training.method == "trajectories"
    # what no prompt names is drawn by all layers but those that read the prompt (the paper's ESD-u)
    unprompted = training.unprompted_guidance > 0 and not given.closed_form
    scope = given.scope or ("esd-x-ff" if by_prompts else "esd-u" if unprompted else "esd-x-strict")
    # LoHa and LoKr have no factor that would take a projection; the other scopes have no layer that reads the prompt alone
    reads_prompt = given.adapter_type in ("lora", "none") and scope not in ("esd-u", "selfattn")
    usual = None if given.adapter_type == "none" else min((16 if by_prompts else 8) * len(prompts.concept), 64)
    rank = given.rank or usual
    return given.replace(
        scope=scope,
        rank=rank,
        alpha=float(rank) if given.alpha is None and rank is not None else given.alpha,  # as config.yaml reads it
        closed_form=(given.closed_form is not False and reads_prompt) if from_pairs else None,
    )


def _is_quick(student: StudentOptions, prompts: PromptOptions) -> bool:
    """Return whether few trajectories are enough: a protected student, and no sources."""
    return student.protected and not prompts.sources


def _resolve_training(given: TrainingOptions, student: StudentOptions, prompts: PromptOptions) -> TrainingOptions:
    """More steps where the learning rate is slower, and to tell apart what is to go from what shares its words."""
    concepts, method = len(prompts.concept), given.method
    few = 20 + 20 * concepts
    # fast where the null space holds everything else in place (docs/scopes.md), or many prompts do
    fast = 3e-3 if student.adapter_type != "none" else 1e-3
    ratio, steps, size, rate = {
        "layers": (0.5, 150 + 50 * concepts, 32, fast),
        "denoiser": (1 / 3, 80 + 80 * concepts, 12, fast),
        "trajectories": (
            0.25 if prompts.sources else 0.125,
            few if _is_quick(student, prompts) else 8 * few,
            8,
            1e-2 if student.protected else 1e-3,
        ),
    }[str(method)]
    if given.preservation_ratio is not None:
        ratio = given.preservation_ratio
    return given.replace(
        preservation_ratio=0.0 if given.train_batch_size == 1 else ratio,
        max_train_steps=steps if given.max_train_steps is None else given.max_train_steps,
        train_batch_size=given.train_batch_size or size,
        learning_rate=given.learning_rate or rate,
    )


def _resolve_contrastive(given: TrainingOptions, concepts: int) -> TrainingOptions:
    training = given.replace(
        method="contrastive",
        train_batch_size=given.train_batch_size or 32,
        learning_rate=given.learning_rate or 1e-4,
    )
    if given.max_train_steps is None:
        training = training.replace(max_train_steps=epochs_of_references(training.train_batch_size, concepts))
    return training


def _resolve_buffer(
    given: BufferOptions,
    method: str,
    student: StudentOptions,
    prompts: PromptOptions,
    family: ModelFamily,
) -> BufferOptions:
    buffer = sampled(given, family)
    if method in BY_PROMPTS and given.num_inference_steps is None:
        buffer = buffer.replace(num_inference_steps=min(PROBE_STEPS, family.num_inference_steps))
    if method != "trajectories":
        return buffer
    interval, concepts, rollout = given.buffer_refresh_interval, len(prompts.concept), given.rollout or "mixed"
    return buffer.replace(
        rollout=rollout,
        trajectories=given.trajectories or (4 + 4 * concepts) * (1 if _is_quick(student, prompts) else 3),
        buffer_refresh_interval=(25 if rollout == "student" else 0) if interval is None else interval,
    )
