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
from typing import Any

from esd_peft.adapters.save import Provenance, note_limits, save_adapter
from esd_peft.erasure import summary
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.encoding import encode_prompts
from esd_peft.erasure.flops import work_line
from esd_peft.erasure.planner import make_plan, plan_table
from esd_peft.erasure.session import Session, in_session
from esd_peft.erasure.work_plan import plan_work
from esd_peft.evaluation.timeline import FOLDER, PAGE
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.io.paths import is_file
from esd_peft.io.terminal import say
from esd_peft.models import open_family
from esd_peft.models.compilation import compiled
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.command_line import run_command
from esd_peft.options.commands import read_command_line
from esd_peft.options.erase import EraseConfig
from esd_peft.runtime import distributed
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.checkpoint import Left
from esd_peft.training.diagnosis import Diagnosis, diagnose
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
    work in FLOPs, seconds and peak memory by phase, and the resolved config. Raises `UserError` for input that cannot work.
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
        profiler.count("text encoders", encoder.calls)

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
            with profiler.phase("evaluate"), student.teacher():
                draw_validation(student, profiler, prompts.validation, "before")
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
            draw_validation(student, profiler, prompts.validation, "after")
        diagnosis = Diagnosis()
        if prompts.probes is not None:
            diagnosis = diagnose(student, prompts.probes, list(method.source.matches), config.buffer, training.seed)
            profiler.count("diagnosis", diagnosis.calls)
    result = summary.make_result(
        config, profiler, trainer, prompts.validation, plan.concepts, method.source.matches, diagnosis
    )
    if checkpoints is not None:
        summary.write(config.checkpoint.output, result)
    return result


def draw_validation(student: Student, profiler: PhaseProfiler, validation: ValidationSampler, label: str) -> None:
    """The validation images of the student, or of the teacher that it is now."""
    call = "evaluation" if label == "before" else "student evaluation"
    with student.autocast(), profiler.drawing(student.denoiser, call, len(validation.evaluator.places)):
        validation.make(student.denoiser, label)


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
        resolved, prompts = resolve(config, family)
        plan = make_plan(config, resolved, prompts, family)
        say(plan_table(plan))
        say(f"at most: {work_line(plan_work(plan.config, prompts, family).to_dict())}")
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
