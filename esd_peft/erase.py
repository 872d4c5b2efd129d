"""python -m esd_peft.erase: concept → prompt embeddings → guided pairs → adapter, and what it changed."""

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin

from esd_peft._version import __version__
from esd_peft.adapters.export import limits, own_metadata, write_kohya_lora
from esd_peft.cli import parse, run_command
from esd_peft.config import EraseConfig
from esd_peft.errors import OutOfMemory, UserError, out_of_memory
from esd_peft.evaluate import command_of, evaluate
from esd_peft.evaluation.gallery import Gallery, check_concepts
from esd_peft.evaluation.options import WITHIN, EvaluateConfig
from esd_peft.evaluation.rates import Shares
from esd_peft.evaluation.table import result_table
from esd_peft.io.jobs import hold, only_job
from esd_peft.io.outputs import check_output, new_directory, new_file
from esd_peft.io.tensors import add_metadata, sha256
from esd_peft.io.terminal import say
from esd_peft.memory.planner import Sizes, make_plan, plan_table, smaller, within_budget
from esd_peft.models import Backbone, PromptEmbeds, open_backbone
from esd_peft.models.compilation import check_compiler, compiled
from esd_peft.models.offload import offload_base
from esd_peft.models.quantize import check_bitsandbytes, load_quantized
from esd_peft.models.sources import commit_of
from esd_peft.prompts.plan import PromptPlan, plan_prompts
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import current, place, release, resolve_device, resolve_dtype
from esd_peft.runtime.profiling import Costs
from esd_peft.runtime.seeds import generator
from esd_peft.runtime.surroundings import surroundings
from esd_peft.runtime.tracking import check_tracker, tracker
from esd_peft.training.adversarial import RobustTarget
from esd_peft.training.checkpoint import Checkpoints
from esd_peft.training.contrastive import make_contrastive
from esd_peft.training.early_stopping import Probe
from esd_peft.training.esd import GuidedTarget, Objective
from esd_peft.training.prompt_maps import prompt_maps
from esd_peft.training.rollout import Rollout, make_table
from esd_peft.training.student import Student, make_student, scope_modules
from esd_peft.training.trainer import distill

_LESS_MEMORY = "plan for less with --memory-budget, or add --quantize nf4 or --offload, or take a smaller model"


def erase(config: EraseConfig) -> dict[str, Any]:
    """Train an adapter that erases `config.concept` and write it to `config.output`.

    Returns what `result.json` holds: the rates before and after (embedded pipeline), losses, seconds and peak memory
    by phase, forward-equivalents, and the config. Raises `UserError` for input that cannot work.
    """
    with only_job():
        distributed.start()
        own = hold(config.output) if distributed.first() else contextlib.nullcontext()
        with own, current(resolve_device(config.device)):
            try:
                result = _erase(config)
            except OutOfMemory as error:
                raise OutOfMemory(error.phase, _LESS_MEMORY) from None
            if config.evaluate and distributed.first():  # what training held is free again
                with _finished(config, command_of(_evaluation(config, result["config"]))):
                    found = evaluate(_evaluation(config, result["config"]))
                if found.accuracies is not None:
                    result["concepts"], result["others"] = found.accuracies.shares
                result["evaluation"] = found.to_dict()
                _write(config, result)
    return result


def _erase(config: EraseConfig) -> dict[str, Any]:
    if distributed.first():
        file = config.preserve_file if os.path.isfile(config.preserve_file or "") else None  # said later if it is none
        inputs = [config.model, config.checkpoint_config, config.reference, file]
        check_output(config.output, config.overwrite or config.resume, inputs)
    check_tracker(config)
    check_bitsandbytes(config.quantize, config.optimizer)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    check_compiler(config, device)
    backbone = open_backbone(config.model, options=config)
    if config.snr_gamma is not None or (config.objective == "contrastive" and backbone.noise_schedule.predicts_noise):
        backbone.noise_schedule.alphas_cumprod()  # before any work it is said if there are none
    given = config
    if device.type == "cuda" or config.memory_budget != "auto":
        config = distributed.from_first(within_budget(config, backbone))
    if config.model is None:
        _check_concepts(backbone, config)
    plan = plan_prompts(config)
    backbone.check_lengths(_given_texts(config, plan))
    if config.model is None:
        for prompt in plan.asked:
            _check_words(backbone, "--preserve", prompt)
    hashes = backbone.denoiser_hashes()
    if not distributed.first():  # the first process takes the pictures and writes
        quiet = config.model_copy(update={"eval_seeds": 0, "report_to": "none"})
        return _run(quiet, backbone, plan, device, dtype, None)
    with Checkpoints(config, hashes, surroundings(device, dtype)) as checkpoints:
        try:
            return _run(config, backbone, plan, device, dtype, checkpoints)
        except OutOfMemory as error:
            phase = error.phase
        # what the run held is free only here: the error's traceback led to it
        release(device)
        config = checkpoints.hand_over(_smaller(given, config, backbone, phase, dtype))
        return _run(config, backbone, plan, device, dtype, checkpoints)


def _smaller(given: EraseConfig, used: EraseConfig, backbone: Backbone, phase: str, dtype: torch.dtype) -> EraseConfig:
    """The settings to try once more with, said on stderr.

    Raises `OutOfMemory` if there are none, or several processes: the others would have to start anew with it.
    """
    found = smaller(Sizes(given, backbone, dtype), given, used, phase) if distributed.size() == 1 else None
    if found is None:
        raise OutOfMemory(phase)
    changed = {f"--{name.replace('_', '-')}": value for name, value in found if value != getattr(used, name)}
    said = ", ".join(option if value is True else f"{option} {value}" for option, value in changed.items())
    print(f"note: the device ran out of memory in {phase}; once more with {said}", file=sys.stderr)
    return found


def _run(
    config: EraseConfig,
    backbone: Backbone,
    plan: PromptPlan,
    device: torch.device,
    dtype: torch.dtype,
    checkpoints: Checkpoints | None,
) -> dict[str, Any]:
    costs = Costs(device)
    with costs.phase("encode"):
        embeds = backbone.encode(plan.texts, device, dtype)
        table = make_table(plan, embeds)
        gallery = Gallery(backbone, config, device, dtype)
    with costs.phase("load"):
        # the weights themselves learn in fp32; under an adapter they are only read
        if config.quantize == "none":
            denoiser = backbone.load_denoiser(torch.float32 if config.adapter == "none" else dtype)
        else:
            denoiser = load_quantized(backbone, config.quantize, dtype, device)
        student = _student(config, plan, backbone, denoiser, embeds, device)
        del embeds  # the table has those that the denoiser is asked
    rollout = Rollout(backbone, denoiser, table, student.teacher, config, device, dtype, costs)
    objective = _objective(rollout, plan)
    with costs.phase("evaluate"), student.teacher():
        before = gallery.take(denoiser, "before") if config.looks else None
    with costs.phase("distill"), compiled(denoiser, objective), tracker(config) as report:
        probe = None if config.until is None else Probe(rollout, generator(config.seed, "probe"))
        bank = generator(config.seed, "bank")
        losses = distill(student, objective, bank, probe, report, checkpoints)
    if checkpoints is not None:
        with costs.phase("save"):
            save_adapter(student, backbone, config, checkpoints.base)

    concepts: Shares = {}
    others: Shares = {}
    if before is not None:
        with costs.phase("evaluate"), _finished(config, command_of(EvaluateConfig(erased=config.output))):
            after = gallery.take(denoiser, "after")
            concepts, others = gallery.rates(before, after)
            with new_file(config.output / "before_after.png") as draft:
                gallery.grid(before, after).save(draft)
    result = _record(rollout, student, losses, probe.curve if probe else [], concepts, others)
    if checkpoints is not None:
        _write(config, result)
    return result


def _record(
    rollout: Rollout, student: Student, losses: list[float], curve: list[tuple[int, float]], concepts: Shares, others: Shares
) -> dict[str, Any]:
    """What result.json holds."""
    config, costs = rollout.config, rollout.costs
    return {
        "concepts": concepts,
        "others": others,
        "loss": {"first": losses[0], "last": losses[-1]},
        "direction_left": curve,
        "forward_equivalents": costs.forward_equivalents,
        "training_tuples": costs.training_tuples,
        "trained_parameters": sum(p.numel() for p in student.parameters),
        "seconds": {name: round(value, 3) for name, value in costs.seconds.items()},
        "peak_memory_bytes": costs.peak_memory_bytes,
        "config": config.model_dump(mode="json"),
        "version": __version__,
    }


@contextlib.contextmanager
def _finished(config: EraseConfig, command: str) -> Iterator[None]:
    """The adapter is not trained again because its pictures need too much memory, or time; `command` takes them.

    Raises `UserError` for the former.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"over its pictures, but the adapter in {config.output} is finished; for the pictures: {command}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"the adapter in {config.output} is finished, but the device ran out of memory over its pictures; take them "
            f"with a smaller --batch-size: {command}"
        ) from None


def _write(config: EraseConfig, result: dict[str, Any]) -> None:
    with new_file(config.output / "result.json") as draft:
        draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _evaluation(config: EraseConfig, used: dict[str, Any]) -> EvaluateConfig:
    """With as much memory as training `used`, which may be less than `config` says."""
    options = {name: used[name] for name in ("device", "dtype", "quantize", "seed")}
    options |= {"seeds": config.eval_seeds, "batch_size": used["rollout_batch_size"]}
    return EvaluateConfig(erased=config.output, output=config.output / WITHIN, **options)


def _student(
    config: EraseConfig,
    plan: PromptPlan,
    backbone: Backbone,
    denoiser: ModelMixin,
    embeds: PromptEmbeds,
    device: torch.device,
) -> Student:
    """What learns, in a denoiser that is on the device now, and what it starts from."""
    if not config.offload:
        place(denoiser, device)
    learning = scope_modules(backbone, denoiser, config.learning_scope)
    here = {name: value.to(denoiser.device) for name, value in embeds.items()}
    maps = prompt_maps(config, plan, backbone, denoiser, here, learning)
    projections, changes = ({kind: value.to(device) for kind, value in found.items()} for found in maps)
    student = make_student(backbone, denoiser, config, projections)
    if config.offload:
        offload_base(denoiser, device)
    student.start_from(changes)
    return student


def _objective(rollout: Rollout, plan: PromptPlan) -> Objective:
    if rollout.config.objective == "contrastive":
        return make_contrastive(rollout, generator(rollout.config.seed, "references"))
    return RobustTarget(rollout, plan) if rollout.config.robust else GuidedTarget(rollout)


def save_adapter(student: Student, backbone: Backbone, config: EraseConfig, hashes: dict[str, str]) -> None:
    """The adapter directory: what was learned, the config that made it, and which base it fits."""
    base = {
        "model": config.model,
        "revision": commit_of(config.model, backbone.path),
        "variant": config.variant,
        "checkpoint_config": config.checkpoint_config,
        "name": backbone.name,
        "class": backbone.pipeline_class.__name__,
        "denoiser_sha256": hashes,
        "version": __version__,
    }
    text = config.model_copy(update={"scope": config.learning_scope}).to_yaml()  # what merged models say of it
    digest = hashlib.sha256(text.encode()).hexdigest()
    metadata = own_metadata(config.concept_names, [config.learning_scope], base, [digest])
    with new_directory(config.output, config.overwrite or config.resume) as draft:
        student.save(draft)
        for file in draft.glob("*.safetensors"):
            add_metadata(file, metadata)
        write_kohya_lora(draft, backbone, config, metadata)
        (draft / "config.yaml").write_text(text, encoding="utf-8")
        base["files"] = {file.name: sha256(file) for file in sorted(draft.iterdir()) if file.is_file()}
        (draft / "base.json").write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
    if config.adapter == "lora":
        for note in limits(backbone, scope_modules(backbone, student.denoiser, config.learning_scope)):
            print(f"note: {note}", file=sys.stderr)


def _given_texts(config: EraseConfig, plan: PromptPlan) -> dict[str, list[str]]:
    """What is encoded of each option's words."""
    goals = [f"{goal} {config.source_of(c)}".strip() for c in config.concept if (goal := config.goal_of(c))]
    named = {"--concept": config.concept_names, "--erase-from": config.sources}
    return named | {"--map-to": goals, "--preserve": plan.asked}


def _check_concepts(backbone: Backbone, config: EraseConfig) -> None:
    for concept in config.concept:
        _check_words(backbone, "--concept", concept.name)
        _check_words(backbone, "--erase-from", config.source_of(concept))
        _check_words(backbone, "--map-to", config.goal_of(concept) or "")
    check_concepts([concept.name for concept in config.concept])


def _check_words(backbone: Backbone, option: str, text: str) -> None:
    if unseen := backbone.unseen_words(text):
        raise UserError(
            f"{option} {text!r}: the embedded pipeline has never seen {', '.join(map(repr, unseen))}; "
            "use its words (circle, red, striped, ...) or name your own pipeline with --model"
        )


def main() -> None:
    """The command line."""
    config = parse(EraseConfig, "erase")
    if config.plan:
        say(plan_table(make_plan(config, open_backbone(config.model, options=config, weights=False))))
        return
    with distributed.joined():
        result = erase(config)
        say(result_table(result))
        merge = shlex.join(["python", "-m", "esd_peft.merge_adapter", "--adapter", str(config.output), "--output", "MERGED"])
        say(f"\nThe adapter, its pictures and result.json are in {config.output}. To make it permanent:\n  {merge}")


if __name__ == "__main__":
    run_command(main)
