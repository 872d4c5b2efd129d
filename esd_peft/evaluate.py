"""python -m esd_peft.evaluate: pictures before and after → what they show → is it gone, is the rest intact?"""

import os
import shlex

import torch

from esd_peft._version import __version__
from esd_peft.attacks.run import Arena, make_attacks
from esd_peft.cli import parse, run_command
from esd_peft.errors import UserError
from esd_peft.evaluation import judging
from esd_peft.evaluation.image_cache import Album
from esd_peft.evaluation.models import Comparison, Model, open_models
from esd_peft.evaluation.options import WITHIN, EvaluateConfig
from esd_peft.evaluation.report import REPORT, write_report
from esd_peft.evaluation.result import Evaluation
from esd_peft.evaluation.suites import Prompt, Suite, ask, load_suite
from esd_peft.evaluation.text import as_text
from esd_peft.io.jobs import hold, only_job
from esd_peft.io.outputs import check_folder, take_folder
from esd_peft.io.terminal import say
from esd_peft.models.quantize import check_bitsandbytes
from esd_peft.models.sampling import encode_prompts, picture_batches
from esd_peft.runtime.devices import current, resolve_device, resolve_dtype
from esd_peft.runtime.profiling import Costs
from esd_peft.runtime.surroundings import surroundings
from esd_peft.worlds.shapes.world import SIZE

PROMPTS_AT_A_TIME = 1000  # encoded together: text encoders and denoiser are never in memory together


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Take the same pictures of the base and the erased model, judge them, and write the report to `config.output`.

    Pictures that an earlier run with the same models and options left there are used again. Raises `UserError` for input
    that cannot work; a detector or a package that is missing is noticed before pictures are made.
    """
    with only_job(), hold(config.output), current(resolve_device(config.device)):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Evaluation:
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_bitsandbytes(config.quantize)
    models = open_models(config)
    suite_name = config.suite or ("shapes" if models.base.embedded else "concept")
    suite = _configured(load_suite(suite_name), config)
    _check_size(suite, models.base)
    prompts, roles = ask(suite, models.concepts, config.prompts, config.limit)
    _check_output(config, models)
    costs = Costs(device)
    attacks = make_attacks(config, suite)
    if {*config.attack} - {"prompts"}:  # these learn from noised pictures: what cannot be noised is said before any are made
        models.erased.backbone.noise_schedule.add_noise(*torch.zeros(3, 1))
    with costs.phase("load"):
        judges = judging.load_judges(config, suite, prompts)
    with costs.phase("before"):
        before = _take("before", models.base, config, suite, prompts, device, dtype)
    with costs.phase("after"):
        after = _take("after", models.erased, config, suite, prompts, device, dtype)
    with costs.phase("judge"):
        judges.to(device)
        places = [(i, k) for i in range(len(prompts)) for k in range(suite.seeds)]
        found = judging.look(judges, prompts, before, after, places, config.batch_size)
        accuracies = judging.rates(found, prompts, roles, suite.seeds) if judges.detector else None
        measures = judging.measures(judges, found, roles, places, config.seed)
    with costs.phase("attack"):
        arena = Arena(config, models, judges.detector, prompts, roles, before, suite, device, dtype)
        attacked = arena.run(attacks)
    result = Evaluation(
        suite=suite_name,
        about=suite.about,
        concepts=list(roles.asking) or models.concepts,
        prompts=len(prompts),
        seeds=suite.seeds,
        num_inference_steps=suite.num_inference_steps or models.base.backbone.num_inference_steps,
        guidance_scale=models.base.backbone.guidance_scale if suite.guidance_scale is None else suite.guidance_scale,
        detector=judges.detector.about if judges.detector else None,
        accuracies=accuracies,
        counts=found.counts,
        measures=measures,
        notes=models.notes,
        seconds={phase: round(value, 3) for phase, value in costs.seconds.items()},
        command=command_of(config),
        config=config.model_dump(mode="json"),
        version=__version__,
        attacks=attacked,
    )
    write_report(config.output, result, prompts, roles, before, after)
    return result


def _check_output(config: EvaluateConfig, models: Comparison) -> None:
    """Raise `UserError` now if the report could not be written later, or would replace what is read or somebody else's."""
    files = [file for file in (config.suite, config.prompts, config.attack_prompts) if file and os.path.isfile(file)]
    read = [*files, config.base, config.detector, config.clip, config.features, config.reference, config.attack_reference,
            models.base.backbone.path, models.erased.backbone.path, models.trained_on]  # fmt: skip
    if config.output.resolve() != (config.erased / WITHIN).resolve():
        read.append(config.erased)
    check_folder(config.output, read, REPORT)


def _configured(suite: Suite, config: EvaluateConfig) -> Suite:
    """The suite with what the config says otherwise. Raises `UserError` for a detector where there is nothing to detect."""
    changes = {name: getattr(config, name) for name in ("seeds", "num_inference_steps", "guidance_scale")}
    changes = {name: value for name, value in changes.items() if value is not None}
    detector = suite.detector
    takes_model = detector is not None and detector.kind in ("classifier", "clip")
    if config.detector is not None and not takes_model:
        raise UserError(
            "--detector is of no use to this --suite, which names what its pictures show by itself or not at all"
        )
    if takes_model and detector is not None:
        model = config.detector or detector.model
        changes["detector"] = detector.model_copy(update={"model": model}) if model else None
    return suite.model_copy(update=changes)


def _check_size(suite: Suite, base: Model) -> None:
    """Before any picture is made: the embedded classifier sees nothing in pictures of another size."""
    if suite.prompts == "world" and base.backbone.picture_size(base.backbone.empty_denoiser()) != (SIZE, SIZE):
        raise UserError(f"--suite shapes is for the embedded pipeline, not for {base.backbone.path}; use another suite")


def _take(
    label: str, model: Model, config: EvaluateConfig, suite: Suite, prompts: list[Prompt], device: torch.device,
    dtype: torch.dtype,
) -> Album:  # fmt: skip
    """The album of the model's pictures; makes what is missing in it."""
    texts = [prompt.text for prompt in prompts]
    settings = suite.picture_settings
    precision = {**surroundings(device, dtype), "quantize": config.quantize}
    made_with = {"weights": model.fingerprint(), "prompts": texts, "seed": config.seed, **precision, **settings}
    take_folder(config.output)
    album = Album(config.output / "pictures" / label, made_with)
    album.open(config.overwrite)
    for first in range(0, len(texts), PROMPTS_AT_A_TIME):
        here = range(first, min(first + PROMPTS_AT_A_TIME, len(texts)))
        if missing := album.missing([(i, k) for i in here for k in range(suite.seeds)]):
            encoded = encode_prompts(model.backbone, texts[first : here.stop], device, dtype)
            pipe = model.pipeline(device, dtype, config.quantize)
            for batch, pictures in picture_batches(
                pipe, encoded, missing, config.batch_size, config.seed, label, first, **settings
            ):
                for place, picture in zip(batch, pictures, strict=True):
                    album.add(place, picture)
            del pipe  # before the text encoders come again
    return album


def command_of(config: EvaluateConfig) -> str:
    """The command line that asks for `config`: the options that are not at their defaults."""
    words = ["python", "-m", "esd_peft.evaluate"]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            option = "--" + name.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            words += [option] if value is True else [word for one in values for word in (option, str(one))]
    return shlex.join(words)


def main() -> None:
    """The command line."""
    config = parse(EvaluateConfig, "evaluate")
    say(as_text(evaluate(config)))
    say(f"\nThe report is {config.output / 'report.html'}; report.md, result.json and the pictures are beside it.")


if __name__ == "__main__":
    run_command(main)
