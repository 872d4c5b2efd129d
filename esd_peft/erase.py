"""python -m esd_peft.erase: ESD ("Erasing Concepts from Diffusion Models", arXiv 2303.07345), in one page.

A frozen teacher predicts the noise of x_t without and with the concept, e_null and e_concept, along denoising trajectories.
A student, the same network with an adapter, learns in the concept's place the guided target

    e_anchor − η (e_concept − e_null)                                    (eq. 6; e_anchor is e_null, or what it is mapped to)

and elsewhere what the teacher predicts. The adapter is saved; `merge_adapter` makes it part of the weights. What surrounds
the method (checks, defaults, memory, processes, checkpoints) is in `session.py`.
"""

import contextlib
import shlex
from typing import Any

from esd_peft import erase_result
from esd_peft.adapters.save import Provenance, note_limits, save_adapter
from esd_peft.cli import parse, run_command
from esd_peft.config import EraseConfig
from esd_peft.defaults import resolve
from esd_peft.evaluation.timeline import FOLDER, PAGE, Timeline
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.io.paths import is_dir, is_file
from esd_peft.io.terminal import say
from esd_peft.memory.planner import make_plan, plan_table
from esd_peft.models import open_family
from esd_peft.models.compilation import compiled
from esd_peft.models.sampling import encode_prompts
from esd_peft.presets import PRESETS
from esd_peft.prompts.table import check_told_apart, make_table
from esd_peft.prompts.wordings import Wordings, amounts, encode_wordings
from esd_peft.runtime import distributed
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.session import Session, in_session
from esd_peft.training.attention import AttentionTraining
from esd_peft.training.checkpoint import Left
from esd_peft.training.diagnosis import choose_probes, diagnose
from esd_peft.training.early_stopping import make_early_stopping
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.monitor import Monitor
from esd_peft.training.names import near
from esd_peft.training.objective import make_objective
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student, load_student
from esd_peft.training.trainer import Trainer
from esd_peft.training.work import count_denoiser_calls


def erase(config: EraseConfig) -> dict[str, Any]:
    """Train an adapter that erases the config's concepts and write it to its output.

    Returns what `result.json` holds: the rates before and after (embedded pipelines), losses, seconds and peak memory by
    phase, NFE, and the config as it ran. Raises `UserError` for input that cannot work.
    """
    return in_session(config, train)


def train(config: EraseConfig, session: Session) -> dict[str, Any]:
    """The method, for a resolved config."""
    family, prompts, checkpoints = session.family, session.prompts, session.checkpoints
    device, dtype = config.runtime.torch_device, config.runtime.torch_dtype
    training, profiler = config.training, PhaseProfiler(device)
    # what a run that was stopped had come to, for --resume
    left = distributed.broadcast(checkpoints and checkpoints.load()) if config.checkpoint.resume else Left()

    # prompts with the concept, without it, and to preserve; text encoders are gone before the denoiser comes
    with profiler.phase("encode"):
        probes = choose_probes(family, prompts, training.seed)
        embeds, probes.embeds = family.encode_groups([prompts.texts, probes.texts], device, dtype)
        check_told_apart(prompts, embeds)
        table = make_table(prompts, embeds)
        wordings = make_wordings(config, session)
        validation = make_validation(config, session) if config.validation.during_training else None
        timeline = make_timeline(config, session)

    # the student, whose teacher is itself with the adapter disabled; it may start from a closed form
    with profiler.phase("load"):
        student = load_student(family, config.student, config.memory, prompts, embeds, device, dtype, training.seed)
        del embeds  # the table has those that the denoiser is given

    # trajectories of the teacher fill a buffer with (x_t, t, e_null, e_concept), of which batches are made;
    # loss(ê, batch) = mean of weight ‖ê − (e_anchor − η (e_concept − e_null))‖², ê being the student's prediction at x_t
    rollout = Rollout(student, profiler)
    monitor = Monitor(student, profiler, session.dashboard, timeline, config.validation.validation_steps)
    with erase_result.before_training():
        monitor.look_at_base()
        if validation is not None:
            with profiler.phase("evaluate"), student.teacher(), student.autocast():
                validation.make(student.denoiser, "before")
    attention: AttentionTraining | None = None
    steps, pushed = config.student.attention_steps, training.unprompted_guidance
    if steps and wordings is not None:  # each cross-attention layer learns the target by itself
        with profiler.phase("attention"):
            attention = AttentionTraining(rollout, wordings, config.buffer, steps, training.seed, monitor, pushed)
            attention.run(checkpoints, left.attention)
    sampler, loss, weight_decay = make_objective(rollout, table, prompts, config.buffer, training, wordings)

    calls = count_denoiser_calls(config.buffer, training)
    with profiler.phase("train"), compiled(student.denoiser, config.runtime.compile, calls, device):
        stopping = make_early_stopping(rollout, table, config.buffer, training)
        trainer = Trainer(student, training, config.memory, weight_decay, profiler)
        loop = TrainingLoop(trainer, sampler, stopping, monitor, checkpoints, attention, left.training, left.buffer)
        del left  # it may be large
        with contextlib.closing(loop.batches()) as batches:
            for batch in batches:
                # prediction, loss, gradients (of so many samples at a time), clipping, AdamW, projection to the null space
                trainer.step(batch, loss)
    verdicts = attention.verdicts if attention else sampler.verdicts  # which words are other names

    if checkpoints is not None:
        with profiler.phase("save"):
            save(config, session, student)
    with profiler.phase("evaluate"), erase_result.finished(config):
        monitor.finish(loop.steps_before + trainer.taken, config.checkpoint.output / FOLDER)
        if validation is not None:
            with student.autocast():
                validation.make(student.denoiser, "after")
        if wordings is not None:
            probes.add_near(found := near(verdicts), wordings.encoded(found))
        counted = "--max-train-steps" if training.max_train_steps else "--attention-steps"
        diagnosis = diagnose(rollout, table, probes, config.buffer, training.seed, counted)
    losses = [*(attention.losses if attention else ()), *trainer.losses]
    result = erase_result.make_result(
        config, profiler, trainer, stopping, validation, prompts.concepts, verdicts, losses, diagnosis
    )
    if checkpoints is not None:
        erase_result.write(config.checkpoint.output, result)
    return result


def make_wordings(config: EraseConfig, session: Session) -> Wordings | None:
    """Many prompts with the concepts and without, encoded, where something learns from them."""
    training, runtime, prompts = config.training, config.runtime, session.prompts
    augments = bool(training.augment_prompts)
    if not augments and not config.student.attention_steps:
        return None
    device, dtype = runtime.torch_device, runtime.torch_dtype
    return encode_wordings(session.family, prompts, training.seed, device, dtype, amounts(augments))


def make_validation(config: EraseConfig, session: Session) -> ValidationSampler:
    """What makes the images before and after, with their prompts encoded."""
    prompts, images, side_by_side = (
        session.prompts,
        config.validation.num_validation_images,
        config.buffer.rollout_batch_size,
    )
    device, dtype, seed = config.runtime.torch_device, config.runtime.torch_dtype, config.training.seed
    return ValidationSampler(session.family, prompts.concepts, images, side_by_side, seed, device, dtype, prompts.given)


def make_timeline(config: EraseConfig, session: Session) -> Timeline | None:
    """What `--validation-prompt` asks to look at, its prompts encoded; a run that is resumed goes on with its looks."""
    checkpoints, prompts, seed = session.checkpoints, config.validation.validation_prompt, config.training.seed
    if checkpoints is None or not (prompts or (config.checkpoint.resume and is_dir(checkpoints.folder / FOLDER))):
        return None
    device, dtype = config.runtime.torch_device, config.runtime.torch_dtype
    encoded = encode_prompts(session.family, prompts, device, dtype) if prompts else None
    images, side_by_side = config.validation.num_validation_images, config.buffer.rollout_batch_size
    title = f"Erasing {', '.join(session.prompts.concepts)}"
    timeline = Timeline(checkpoints.folder / FOLDER, prompts, images, seed, side_by_side, encoded, title)
    left = checkpoints.step if config.checkpoint.resume else None
    timeline.open(left)
    say(f"images of --validation-prompt as it trains: {timeline.page}")
    return timeline


def save(config: EraseConfig, session: Session, student: Student) -> None:
    """The adapter, for PEFT, diffusers and kohya; with the config that makes it again, and which base it fits."""
    family, scope, is_lora = session.family, config.student.scope, config.student.adapter_type == "lora"
    concepts, yaml = session.prompts.concepts, config.of_result().to_yaml()
    made = Provenance(family, config.pretrained, session.denoiser_sha256, concepts, scope, yaml)
    overwrite = config.checkpoint.overwrite or config.checkpoint.resume
    save_adapter(student.save, config.checkpoint.output, overwrite, made, is_lora)
    if is_lora:
        note_limits(family, student.denoiser, scope)


def main() -> None:
    """The command line."""
    config = parse(EraseConfig, "erase", presets=PRESETS)
    if config.memory.plan:
        family = open_family(config.pretrained.model, options=config.pretrained, weights=False)
        say(plan_table(make_plan(config, *resolve(config, family), family)))
        return
    with distributed.joined():
        result = erase(config)
        say(erase_result.table(result))
        output = str(config.checkpoint.output)
        merge = shlex.join(["python", "-m", "esd_peft.merge_adapter", "--adapter", output, "--output", "MERGED"])
        if is_file(page := config.checkpoint.output / FOLDER / PAGE):
            say(f"\nWhat --validation-prompt shows, step by step: {page}")
        say(f"\nThe adapter, its images and result.json are in {output}. To make it permanent:\n  {merge}")


if __name__ == "__main__":
    run_command(main)
