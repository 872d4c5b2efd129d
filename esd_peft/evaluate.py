"""python -m esd_peft.evaluate: images before and after → what they show → is it gone, is the rest intact?"""

import dataclasses
import shlex

import torch

from esd_peft._version import __version__
from esd_peft.attacks.run import AttackRunner, make_attacks
from esd_peft.errors import UserError
from esd_peft.evaluation.comparison import Comparison, Model, open_models
from esd_peft.evaluation.evaluator import Evaluator
from esd_peft.evaluation.image_cache import ImageCache
from esd_peft.evaluation.metrics import load_metrics, measures
from esd_peft.evaluation.report import REPORT, write_report
from esd_peft.evaluation.result import Evaluation
from esd_peft.evaluation.suites import Suite, load_suite, select_prompts
from esd_peft.evaluation.text import as_text
from esd_peft.io.jobs import lock_output, only_job
from esd_peft.io.outputs import check_folder, take_folder
from esd_peft.io.paths import is_file
from esd_peft.io.terminal import say
from esd_peft.models.dry_run import check_steps
from esd_peft.models.quantize import check_bitsandbytes
from esd_peft.models.sampling import encode_prompts
from esd_peft.options.base import flag
from esd_peft.options.command_line import run_command
from esd_peft.options.commands import read_command_line
from esd_peft.options.evaluate import WITHIN, EvaluateConfig
from esd_peft.options.model import DrawingOptions
from esd_peft.runtime.devices import current, resolve_device, resolve_dtype
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.runtime.reproducibility import bits_depend_on
from esd_peft.worlds.world import Prompt

EVALUATION = "an evaluation"  # kind of the directory
PROMPTS_AT_A_TIME = 1000  # encoded together: text encoders and denoiser are never in memory together


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Take the same images of the base and the erased model, judge them, and write the report to `config.output`.

    Images that an earlier run with the same models and options left there are used again. Raises `UserError` for input
    that cannot work, and `UnusableImages` where images are NaN or all of one colour, from which no verdict may come; a
    detector or a package that is missing is noticed before images are made.
    """
    with only_job(), lock_output(config.output), current(resolve_device(config.device)):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Evaluation:
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_bitsandbytes(device, config.quantize)
    models = open_models(config)
    world = models.base.family.world
    suite_name = config.suite or (world.name if world else "concept")
    suite = _configured(load_suite(suite_name), config)
    _check_size(suite, models.base)
    prompts, roles = select_prompts(suite, models.concepts, config.prompts, config.limit, models.preserved)
    _check_output(config, models)
    _check_steps(suite, prompts, models)
    models.base.family.check_seen({"--concept": models.concepts})
    profiler = PhaseProfiler(device)
    attacks = make_attacks(config, suite)
    if {*config.attack} - {"prompts"}:  # the others train on noised images: check the schedule before any image is drawn
        models.erased.family.noise_schedule.add_noise(*torch.zeros(3, 1))
    with profiler.phase("load"):
        metrics = load_metrics(config, suite, prompts)
    evaluator = Evaluator(suite, prompts, roles, metrics, config.seed, config.batch_size)
    with profiler.phase("before"):
        before = _images("before", models.base, models.drawing, config, evaluator, device, dtype)
    with profiler.phase("after"):
        after = _images("after", models.erased, models.drawing, config, evaluator, device, dtype)
    with profiler.phase("judge"):
        metrics.to(device)
        findings = evaluator.score(before, after)
    with profiler.phase("attack"):
        runner = AttackRunner(config, models, metrics.detector, prompts, roles, before, suite, device, dtype)
        attack_results = runner.run(attacks)
    result = Evaluation(
        suite=suite_name,
        about=suite.about,
        concepts=list(roles.concept_prompts) or models.concepts,
        prompts=len(prompts),
        seeds=suite.seeds,
        num_inference_steps=suite.num_inference_steps or models.base.family.num_inference_steps,
        guidance_scale=models.base.family.guidance_scale if suite.guidance_scale is None else suite.guidance_scale,
        detector=metrics.detector.judge if metrics.detector else None,
        accuracies=evaluator.accuracies(findings),
        counts=findings.counts,
        measures=measures(metrics, findings, roles, evaluator.places, config.seed),
        notes=models.notes,
        seconds={phase: round(value, 3) for phase, value in profiler.seconds.items()},
        command=command_of(config),
        config=config.model_dump(mode="json"),
        version=__version__,
        attacks=attack_results,
    )
    write_report(config.output, result, prompts, roles, before, after)
    return result


def _check_output(config: EvaluateConfig, models: Comparison) -> None:
    """Raise `UserError` before any work if the report could not be written, or would replace an input or foreign files."""
    files = [file for file in (config.suite, config.prompts, config.attack_prompts) if file and is_file(file)]
    read = [*files, config.base, config.detector, config.clip, config.features, config.reference, config.attack_reference,
            models.base.family.path, models.erased.family.path, models.trained_on]  # fmt: skip
    if not _within(config):
        read.append(config.erased)
    check_folder(config.output, EVALUATION, read, REPORT)


def _within(config: EvaluateConfig) -> bool:
    """Return whether the report becomes a part of the evaluated model."""
    return config.output.resolve() == (config.erased / WITHIN).resolve()


def _configured(suite: Suite, config: EvaluateConfig) -> Suite:
    """Apply the config to the suite. Raises `UserError` for a detector without labels to detect."""
    changes = {name: getattr(config, name) for name in ("seeds", "num_inference_steps", "guidance_scale")}
    changes = {name: value for name, value in changes.items() if value is not None}
    detector = suite.detector
    takes_model = detector is not None and detector.kind in ("classifier", "clip")
    if config.detector is not None and not takes_model:
        raise UserError("--detector is of no use to this --suite, which names what its images show by itself or not at all")
    if takes_model and detector is not None:
        model = config.detector or detector.model
        changes["detector"] = detector.model_copy(update={"model": model}) if model else None
    return suite.model_copy(update=changes)


def _check_size(suite: Suite, base: Model) -> None:
    """Before any image is made: an embedded classifier sees nothing in images of another size."""
    if suite.world is None:
        return
    size, family = suite.world.image_size, base.family
    if family.image_size(family.empty_denoiser()) != (size, size):
        raise UserError(f"--suite {suite.world.name} is for the embedded pipeline, not for {family.path}; use another suite")


def _check_steps(suite: Suite, prompts: list[Prompt], models: Comparison) -> None:
    """Before any image is made: of all ways in which there are images to draw."""
    usual = suite.num_inference_steps or models.base.family.num_inference_steps
    ways = {(prompt.sampling.num_inference_steps or usual, prompt.sampling.scheduler) for prompt in prompts}
    for family in {models.base.family, models.erased.family}:
        for steps, scheduler in sorted(ways, key=str):
            check_steps(family, steps, "--num-inference-steps, or that of --suite,", scheduler)


def _images(
    label: str,
    model: Model,
    drawing: DrawingOptions,
    config: EvaluateConfig,
    evaluator: Evaluator,
    device: torch.device,
    dtype: torch.dtype,
) -> ImageCache:
    """The model's images on disk; makes those that are missing there. Raises `UnusableImages` if they show nothing."""
    texts, settings = [prompt.text for prompt in evaluator.prompts], evaluator.suite.image_settings
    precision = {**bits_depend_on(device, dtype), "quantize": config.quantize}
    ways = [dataclasses.asdict(prompt.sampling) for prompt in evaluator.prompts]
    made_with = {"weights": model.fingerprint(), "prompts": texts, "sampling": ways, "seed": config.seed}
    made_with |= {**precision, **settings, **drawing.drawing()}
    take_folder(config.output, EVALUATION, part_of=config.erased if _within(config) else None)
    cache = ImageCache(config.output / "images" / label, made_with, part_of=config.output)
    cache.open(config.overwrite)
    for first in range(0, len(texts), PROMPTS_AT_A_TIME):
        rows = range(first, min(first + PROMPTS_AT_A_TIME, len(texts)))
        if evaluator.missing(cache, rows):
            encoded = encode_prompts(model.family, texts[first : rows.stop], device, dtype, evaluator.negatives)
            pipe = model.pipeline(device, dtype, config.quantize)
            evaluator.make(cache, pipe, encoded, label, rows)
            del pipe  # before the text encoders come again
    evaluator.check(cache, label)
    return cache


def command_of(config: EvaluateConfig) -> str:
    """The command line that asks for `config`: the options that are not at their defaults."""
    words = ["python", "-m", "esd_peft.evaluate"]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            option = flag(name)
            values = value if isinstance(value, list) else [value]
            words += [option] if value is True else [word for one in values for word in (option, str(one))]
    return shlex.join(words)


def main() -> None:
    """The command line."""
    config = read_command_line(EvaluateConfig)
    say(as_text(evaluate(config)))
    say(f"\nThe report is {config.output / 'report.html'}; report.md, result.json and the images are beside it.")


if __name__ == "__main__":
    run_command(main)
