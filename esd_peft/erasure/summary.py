"""What `result.json` holds, and the table that the erase command ends with."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from esd_peft._version import __version__
from esd_peft.adapters.hub import ADAPTER_FILES, Repository
from esd_peft.adapters.model_card import adapter_card
from esd_peft.adapters.saved import read_adapter
from esd_peft.errors import UnusableImages, UserError, out_of_memory
from esd_peft.evaluate import command_of, evaluate
from esd_peft.evaluation.rates import Accuracies
from esd_peft.evaluation.text import MARKS
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.io.outputs import new_file
from esd_peft.models import open_family
from esd_peft.options.erase import EraseConfig
from esd_peft.options.evaluate import WITHIN, EvaluateConfig
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.diagnosis import Diagnosis
from esd_peft.training.early_stopping import EarlyStopping
from esd_peft.training.synonyms import SynonymMatch
from esd_peft.training.trainer import Trainer


def make_result(
    config: EraseConfig,
    profiler: PhaseProfiler,
    trainer: Trainer,
    stopping: EarlyStopping | None,
    validation: ValidationSampler | None,
    concepts: list[str],
    matches: Sequence[SynonymMatch],
    diagnosis: Diagnosis,
) -> dict[str, Any]:
    """What `result.json` holds; writes the images that were made into the output."""
    found: Accuracies | None = None
    if validation is not None:
        with profiler.phase("evaluate"), finished(config):
            found = validation.accuracies()
            with new_file(config.checkpoint.output / "before_after.png") as draft:
                validation.grid().save(draft)
    return {
        **recognised(found),
        "synonyms": {
            concept: {"erased": [c.text for c in match.synonyms], "preserved": [c.text for c in match.others]}
            for concept, match in zip(concepts, matches, strict=False)
        },
        "loss": {"first": trainer.losses[0], "last": trainer.losses[-1]} if trainer.losses else {},
        "direction_left": stopping.curve if stopping else [],
        "diagnosis": diagnosis.to_dict(),
        "nfe": profiler.nfe,
        "training_samples": profiler.training_samples,
        "trained_parameters": sum(p.numel() for p in trainer.student.parameters),
        "seconds": {name: round(value, 3) for name, value in profiler.seconds.items()},
        "peak_memory_bytes": profiler.peak_memory_bytes,
        "config": config.of_result().model_dump(mode="json"),
        "version": __version__,
    }


def recognised(found: Accuracies | None) -> dict[str, Any]:
    """The rates before and after: of concepts and others in unseen prompts, and by prompt group."""
    if found is None:
        return {"concepts": {}, "others": {}, "prompt_groups": {}}
    concepts, others = found.shares
    groups = {key: rates.to_dict() for key, rates in found.groups.items()}
    return {"concepts": concepts, "others": others, "prompt_groups": groups}


def write(output: Path, result: dict[str, Any]) -> None:
    """Write `result.json` into the output. Raises `UserError` if that does not work."""
    with new_file(output / "result.json") as draft:
        draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def finished(config: EraseConfig, command: str | None = None) -> Iterator[None]:
    """The adapter that is there is not trained again because its images need too much memory, or time, or show nothing;
    `command` makes them.

    Raises `UserError` for the first and the last.
    """
    output = config.checkpoint.output
    command = command or command_of(EvaluateConfig(erased=output, **config.pretrained.drawing()))
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"over its images, but the adapter in {output} is finished; for the images: {command}"
        ) from None
    except UnusableImages as error:
        raise UnusableImages(f"the adapter in {output} is finished, but {error}; then: {command}") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"the adapter in {output} is finished, but the device ran out of memory over its images; make them with a "
            f"smaller --batch-size: {command}"
        ) from None


@contextlib.contextmanager
def before_training() -> Iterator[None]:
    """Images of the base that show nothing are said before any work, with the way to train all the same."""
    try:
        yield
    except UnusableImages as error:
        raise UnusableImages(
            f"{error}; to train without images, add --num-validation-images 0 and leave --validation-prompt out"
        ) from None


def add_evaluation(config: EraseConfig, result: dict[str, Any]) -> None:
    """Evaluate the finished adapter, and add what was found to its `result`."""
    options = _evaluation(config, result["config"])
    with finished(config, command_of(options)):
        found = evaluate(options)
    if found.accuracies is not None:
        result |= recognised(found.accuracies)
    result["evaluation"] = found.to_dict()
    write(config.checkpoint.output, result)


def upload(config: EraseConfig, repository: Repository) -> None:
    """Upload the finished adapter, and its card, which is written beside it. Raises `UserError` if that does not work."""
    output, pretrained = config.checkpoint.output, config.pretrained
    family = open_family(pretrained.model, options=pretrained, weights=False)
    with new_file(output / "README.md") as draft:
        draft.write_text(adapter_card(read_adapter(output), family, repository.name), encoding="utf-8")
    repository.upload(output, ADAPTER_FILES)


def _evaluation(config: EraseConfig, used: dict[str, Any]) -> EvaluateConfig:
    """With as much memory as training `used`, which may be less than `config` says."""
    output, seeds = config.checkpoint.output, config.validation.num_validation_images
    return EvaluateConfig(
        erased=output,
        output=output / WITHIN,
        seeds=seeds,
        batch_size=used["buffer"]["rollout_batch_size"],
        quantize=used["memory"]["quantize"],
        seed=config.training.seed,
        device=config.runtime.device,
        dtype=config.runtime.dtype,
        **config.pretrained.drawing(),
    )


def table(result: dict[str, Any]) -> str:
    """What `result.json` holds, for people: rates where there are any, then losses and costs."""
    verdicts = result.get("evaluation", {}).get("verdict", [])
    lines = [*(f"{MARKS[verdict['level']]} {verdict['text']}" for verdict in verdicts), *([""] if verdicts else [])]
    if result["prompt_groups"]:
        lines += _group_lines(result["prompt_groups"])
    elif result["concepts"]:
        width = max(map(len, [*result["concepts"], *result["others"]])) + 2
        lines.append(f"{'recognised in images':<{max(width, 24)}}before   after")
        lines += [_rates(name, rates, width) for name, rates in (result["concepts"] | result["others"]).items()]
    if result["concepts"]:
        lines.append("")
    seconds, peaks = result["seconds"], result["peak_memory_bytes"]
    lines.append(f"{'phase':<12}{'seconds':>9}{'peak MiB':>10}")
    lines += [f"{name:<12}{seconds[name]:>9.1f}{peaks[name] / 2**20:>10.0f}" for name in seconds]
    lines.append(f"{'total':<12}{sum(seconds.values()):>9.1f}{max(peaks.values()) / 2**20:>10.0f}")
    nfe, samples = result["nfe"], result["training_samples"]
    lines += [
        "",
        (f"loss {result['loss']['first']:.5f} → {result['loss']['last']:.5f}, " if result["loss"] else "")
        + f"{result['trained_parameters']:,} parameters trained",
        f"{nfe:,} denoiser evaluations (NFE)" + (f" for {samples:,} training samples" if samples else ""),
    ]
    for concept, found in result["synonyms"].items():
        for side, says in (("erased", "synonyms of {}, as the teacher sees it, erased with it"), ("preserved", "preserved")):
            if found[side]:
                lines.append(f"{says.format(concept)}: {_some(found[side])}")
    if result["direction_left"]:
        curve = ", ".join(f"{fraction:.2f} ({step})" for step, fraction in result["direction_left"])
        lines.append(f"left of the concept's direction on held-out samples (at step): {curve}")
    lines += ["", *_diagnosis_lines(result["diagnosis"])]
    return "\n".join(lines)


def _diagnosis_lines(diagnosis: dict[str, Any]) -> Iterator[str]:
    """What predictions say, and what to turn."""
    for kind, says in (
        ("left", "of the concept's direction is left"),
        ("listed", "is how far prompts on the list have moved"),
        ("near", "is how far prompts like the concept have moved"),
        ("unlisted", "is how far random words have moved"),
    ):
        if figures := diagnosis[kind]:
            worst = max(figures, key=figures.__getitem__)
            average, most = (max(0.0, share) for share in (mean(figures.values()), figures[worst]))
            yield f"{average:>6.0%} {says} (most: {worst!r}, {most:.0%})"
    yield from (f"→ {advice}" for advice in diagnosis["advice"])


def _some(texts: list[str], count: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = len(texts) - count
    return ", ".join(texts[:count]) + (f" and {more} more" if more > 0 else "")


def _rates(name: str, rates: dict[str, float], width: int) -> str:
    return f"{name:<{max(width, 24)}}{rates['before']:>5.1%}  {rates['after']:>6.1%}"


def _group_lines(groups: dict[str, Any]) -> list[str]:
    """Images that show what they are asked for: the erased concepts first, then what is preserved; of both
    first prompts that training has not seen."""
    lines = []
    for title, erased, seen in (
        ("erased: images that still show it, in prompts held out from training", True, False),
        ("in prompts like those of training", True, True),
        ("preserved: images that show what is asked, in no list and not trained on", False, False),
        ("on the list of preservation prompts", False, True),
    ):
        rows = [s for s in groups.values() if (s["erased"], s["seen"]) == (erased, seen)]
        if rows:
            lines.append(f"{title:<82}  95 %")
        for s in rows:
            low, high = s["after"]["interval"]
            before, after = (f"{s[half]['hits']} of {s[half]['count']}" for half in ("before", "after"))
            lines.append(f"  {s['title']:<60}{f'{before} → {after}':>20}  {low:.0%} to {high:.0%}")
            if not erased and s["worst_lost"] > 0:
                lines.append(f"    most of {s['worst']}: {100 * s['worst_lost']:.0f} points")
    return lines
