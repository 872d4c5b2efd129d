"""python -m esd_peft.erase: ESD ("Erasing Concepts from Diffusion Models", arXiv 2303.07345), in one page.

A frozen teacher predicts the noise of x_t along denoising trajectories: e_concept for a prompt with the concept, e_null for
the prompt without it. A student, the same network with an adapter, learns the guided target for prompts with the concept:

    e_anchor − η (e_concept − e_null)                                                                              (eq. 6)

e_anchor is e_null, or the prediction for the prompt that the concept is mapped to. For all other prompts the student learns
the teacher's own prediction. The run saves the adapter, and `merge_adapter` merges it into the weights.
`erasure/session.py` has the rest: checks, defaults, memory, processes, checkpoints.
"""

import contextlib
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from esd_peft.adapters.save import Provenance, note_limits, save_adapter
from esd_peft.erasure import summary
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import make_plan, plan_table
from esd_peft.erasure.session import Session, in_session
from esd_peft.evaluation.timeline import FOLDER, PAGE, Timeline
from esd_peft.evaluation.validation import FEW_STEPS, ValidationSampler
from esd_peft.io.paths import is_dir, is_file
from esd_peft.io.terminal import say
from esd_peft.models import PromptEmbeds, open_family
from esd_peft.models.compilation import compiled
from esd_peft.models.sampling import encode_with
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.command_line import run_command
from esd_peft.options.commands import read_command_line
from esd_peft.options.erase import EraseConfig
from esd_peft.options.training import BY_PROMPTS
from esd_peft.prompts.augmentation import PromptTable, amounts, augment_prompts
from esd_peft.prompts.table import PairTable, check_distinct, make_table
from esd_peft.runtime import distributed
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.checkpoint import Left
from esd_peft.training.diagnosis import Diagnosis, Probes, choose_probes, diagnose
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.method import Materials, make_method
from esd_peft.training.monitor import Monitor
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import Student, load_student
from esd_peft.training.trainer import Trainer
from esd_peft.training.work import count_denoiser_calls, look_interval


def erase(config: EraseConfig) -> dict[str, Any]:
    """Train an adapter that erases the config's concepts and write it to its output.

    Returns the contents of `result.json`: rates before and after (embedded pipelines), synonyms, the diagnosis, losses, NFE,
    seconds and peak memory by phase, and the resolved config. Raises `UserError` for input that cannot work.
    """
    return in_session(config, train)


def train(config: EraseConfig, session: Session) -> dict[str, Any]:
    """The method, for a resolved config."""
    family, plan, checkpoints = session.family, session.prompts, session.checkpoints
    device, dtype = config.runtime.torch_device, config.runtime.torch_dtype
    training, profiler = config.training, PhaseProfiler(device)
    # the state of the interrupted run, for --resume
    left = distributed.broadcast(checkpoints and checkpoints.load()) if config.checkpoint.resume else Left()
    if distributed.is_main_process():
        print(f"method: {training.method}, {training.max_train_steps} steps", file=sys.stderr)

    # every prompt of the run, encoded; text encoders are gone before the denoiser comes
    with profiler.phase("encode"), TextEncoder(family, device, dtype) as encoder:
        prompts = encode_prompts(config, session, encoder)

    # the student, whose teacher is itself with the adapter disabled
    with profiler.phase("load"):
        student = load_student(family, config.student, config.memory, plan, prompts.plan, device, dtype, training.seed)
        prompts.plan.clear()  # the table of pairs has those that the denoiser is given

    # the method chooses what learns, and the batches: samples, prompts, and the teacher's predictions for them
    # loss(ê, batch) = mean of weight ‖ê − (e_anchor − η (e_concept − e_null))‖² / ‖e_concept − e_null‖² for the student's
    # prediction ê (`target.guided_loss`; the method `contrastive` has its own loss)
    rollout = Rollout(student, profiler)
    monitor = Monitor(student, profiler, session.dashboard, prompts.timeline, look_interval(training))
    with summary.before_training():
        monitor.look_at_base()
        if prompts.validation is not None:
            with profiler.phase("evaluate"), student.teacher(), student.autocast():
                prompts.validation.make(student.denoiser, "before")
    method = make_method(Materials(rollout, prompts.pairs, prompts.table, plan.concepts, config.buffer, training))

    calls = count_denoiser_calls(config.buffer, training)
    with profiler.phase("train"), compiled(student.denoiser, config.runtime.compile, calls, device):
        trainer = Trainer(method, training, config.memory, profiler)
        loop = TrainingLoop(trainer, method.source, monitor, checkpoints, left.training, left.buffer)
        del left  # it may be large
        with contextlib.closing(loop.batches()) as batches:
            for batch in batches:
                trainer.step(batch)

    if checkpoints is not None:
        with profiler.phase("save"):
            save(config, session, student)
    with profiler.phase("evaluate"), summary.finished(config):
        monitor.finish(trainer.taken, config.checkpoint.output / FOLDER)
        if prompts.validation is not None:
            with student.autocast():
                prompts.validation.make(student.denoiser, "after")
        diagnosis = Diagnosis()
        if prompts.probes is not None:
            diagnosis = diagnose(student, prompts.probes, list(method.source.matches), config.buffer, training.seed)
    result = summary.make_result(
        config, profiler, trainer, prompts.validation, plan.concepts, method.source.matches, diagnosis
    )
    if checkpoints is not None:
        summary.write(config.checkpoint.output, result)
    return result


@dataclass
class EncodedRun:
    """Every prompt of a run, encoded."""

    plan: PromptEmbeds  # of the plan's texts, on the device
    pairs: PairTable
    table: PromptTable | None  # many prompts, for the methods that learn from them
    probes: Probes | None  # none without images: the diagnosis draws, too
    validation: ValidationSampler | None
    timeline: Timeline | None


def encode_prompts(config: EraseConfig, session: Session, encoder: TextEncoder) -> EncodedRun:
    """Make the run's prompts and encode them, by text encoders that are loaded once."""
    plan, training, validation = session.prompts, config.training, config.validation
    embeds = {name: value.to(encoder.device) for name, value in encoder.encode(plan.texts).items()}
    check_distinct(plan, embeds)
    table = None
    if training.method in BY_PROMPTS:
        table = augment_prompts(encoder, plan, training.seed, amounts(training.method))
    probes = None
    if validation.num_validation_images:
        probes = choose_probes(session.family, plan, table, training.seed)
        probes.texts.add(probes.all, encoder.encode(probes.all))
    images, side_by_side = validation.num_validation_images, config.buffer.rollout_batch_size
    sampler = None
    if images:
        steps = FEW_STEPS if session.family.world else None
        sampler = ValidationSampler(encoder, plan.concepts, images, side_by_side, training.seed, plan.user_preserved, steps)
    timeline = make_timeline(config, session, encoder)
    return EncodedRun(embeds, make_table(plan, embeds), table, probes, sampler, timeline)


def make_timeline(config: EraseConfig, session: Session, encoder: TextEncoder) -> Timeline | None:
    """The images of `--validation-prompt`, its prompts encoded; a run that is resumed goes on with those it has."""
    checkpoints, prompts, seed = session.checkpoints, config.validation.validation_prompt, config.training.seed
    if checkpoints is None or not (prompts or (config.checkpoint.resume and is_dir(checkpoints.folder / FOLDER))):
        return None
    images, side_by_side = config.validation.num_validation_images, config.buffer.rollout_batch_size
    title = f"Erasing {', '.join(session.prompts.concepts)}"
    encoded = encode_with(encoder, prompts) if prompts else None
    timeline = Timeline(checkpoints.folder / FOLDER, prompts, images, seed, side_by_side, encoded, title)
    timeline.open(checkpoints.step if config.checkpoint.resume else None)
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
    config = read_command_line(EraseConfig)
    if config.memory.plan:
        family = open_family(config.pretrained.model, options=config.pretrained, weights=False)
        say(plan_table(make_plan(config, *resolve(config, family), family)))
        return
    with distributed.joined():
        result = erase(config)
        say(summary.table(result))
        output = str(config.checkpoint.output)
        merge = shlex.join(["python", "-m", "esd_peft.merge_adapter", "--adapter", output, "--output", "MERGED"])
        if is_file(page := config.checkpoint.output / FOLDER / PAGE):
            say(f"\nWhat --validation-prompt shows, step by step: {page}")
        say(f"\nThe adapter, its images and result.json are in {output}. To make it permanent:\n  {merge}")


if __name__ == "__main__":
    run_command(main)
