"""The contents of `result.json`, and the closing table of the erase command."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from esd_peft._version import __version__
from esd_peft.adapters.hub import ADAPTER_FILES, Repository
from esd_peft.adapters.model_card import adapter_card
from esd_peft.adapters.saved import read_adapter
from esd_peft.erasure.flops import CallCosts, Work, work_line
from esd_peft.errors import UnusableImages, UserError, out_of_memory
from esd_peft.evaluate import command_of
from esd_peft.evaluation.rates import Accuracies
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.io.outputs import new_file
from esd_peft.models import open_family
from esd_peft.options.erase import EraseConfig
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.diagnosis import Diagnosis, Shown
from esd_peft.training.synonyms import SynonymMatch
from esd_peft.training.trainer import Trainer


def make_result(
    config: EraseConfig,
    profiler: PhaseProfiler,
    trainer: Trainer,
    validation: ValidationSampler | None,
    concepts: list[str],
    matches: Sequence[SynonymMatch],
    diagnosis: Diagnosis,
) -> dict[str, Any]:
    """Return the contents of `result.json`, and write the images into the output."""
    found: Accuracies | None = None
    if validation is not None:
        with profiler.phase("evaluate"), finished(config):
            found = validation.accuracies()
            with new_file(config.checkpoint.output / "before_after.png") as draft:
                validation.grid().save(draft)
    if diagnosis.pictures is not None:
        with finished(config), new_file(config.checkpoint.output / "diagnosis.png") as draft:
            diagnosis.pictures.save(draft)
    return {
        **recognised(found),
        "synonyms": {
            concept: {"erased": [c.text for c in match.synonyms], "preserved": [c.text for c in match.others]}
            for concept, match in zip(concepts, matches, strict=False)
        },
        "loss": {"first": trainer.losses[0], "last": trainer.losses[-1]} if trainer.losses else {},
        "diagnosis": diagnosis.to_dict(),
        "nfe": profiler.nfe,
        "work": _work(config, profiler, trainer).to_dict(),
        "training_samples": profiler.training_samples,
        "trained_parameters": sum(p.numel() for p in trainer.student.parameters),
        "seconds": {name: round(value, 3) for name, value in profiler.seconds.items()},
        "peak_memory_bytes": profiler.peak_memory_bytes,
        "config": config.of_result().model_dump(mode="json"),
        "version": __version__,
    }


def _work(config: EraseConfig, profiler: PhaseProfiler, trainer: Trainer) -> Work:
    """Return the work of the run in FLOPs."""
    costs = CallCosts(trainer.student.family, config.student, config.memory.gradient_checkpointing)
    return Work.of(profiler.calls, costs)


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
def finished(config: EraseConfig) -> Iterator[None]:
    """The adapter that is there is not trained again because its images need too much memory, or time, or show nothing.

    Raises `UserError` for the first and the last.
    """
    output = config.checkpoint.output
    command = command_of(EvaluateConfig(erased=output, **config.pretrained.drawing()))
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


def upload(config: EraseConfig, repository: Repository) -> None:
    """Upload the finished adapter, and its card, which is written beside it. Raises `UserError` if that does not work."""
    output, pretrained = config.checkpoint.output, config.pretrained
    family = open_family(pretrained.model, options=pretrained, weights=False)
    with new_file(output / "README.md") as draft:
        draft.write_text(adapter_card(read_adapter(output), family, repository.name), encoding="utf-8")
    repository.upload(output, ADAPTER_FILES)


def table(result: dict[str, Any]) -> str:
    """Format `result.json` for people: rates where there are any, then losses and costs."""
    lines: list[str] = []
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
        work_line(result["work"]),
    ]
    for concept, found in result["synonyms"].items():
        for side, says in (("erased", "synonyms of {}, as the teacher sees it, erased with it"), ("preserved", "preserved")):
            if found[side]:
                lines.append(f"{says.format(concept)}: {_some(found[side])}")
    lines += ["", *_diagnosis_lines(result["diagnosis"]), *_negative_prompt_note(result["config"])]
    return "\n".join(lines)


def _diagnosis_lines(diagnosis: dict[str, Any]) -> Iterator[str]:
    """Short draws of held-out prompts, as the teacher judges them, and what to do."""
    rows = (
        ("paraphrases", "paraphrases that show {}"),
        ("synonyms", "draws of {} that show the concept"),
        ("neighbours", "draws of {} that show it"),
    )
    if any(diagnosis[question] for question, _ in rows):
        yield f"{'short draws of held-out prompts, as the teacher judges them':<70}{'before → after':>18}  95 %"
    for question, says in rows:
        found = {subject: Shown(**counts) for subject, counts in diagnosis[question].items()}
        if question == "neighbours":
            found = {subject: shown for subject, shown in found.items() if shown.known}
        for subject, shown in [*found.items()][:4]:
            low, high = shown.interval
            yield f"  {says.format(repr(subject)):<68}{shown!s:>18}  {low:.0%} to {high:.0%}"
    yield from (f"→ {advice}" for advice in diagnosis["advice"])


def _negative_prompt_note(config: dict[str, Any]) -> list[str]:
    """A note on negative prompts, for a target beyond e_null (η > 0); the diagnosis does not see their effect reliably."""
    own = [concept.get("negative_guidance") for concept in config["prompts"]["concept"] if isinstance(concept, dict)]
    if not any([config["prompts"].get("negative_guidance"), *own]):
        return []
    return ["note: as a negative prompt a concept's name may draw it now; leave it out there (docs/evaluation.md)"]


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
