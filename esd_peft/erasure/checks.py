"""Checks of a run before any work is done."""

import torch

from esd_peft.adapters.save import ADAPTER
from esd_peft.errors import UserError
from esd_peft.evaluation.validation import check_concepts
from esd_peft.io.outputs import check_output
from esd_peft.models import ModelFamily
from esd_peft.models.compilation import check_compiler
from esd_peft.models.dry_run import check_steps
from esd_peft.models.quantize import check_bitsandbytes
from esd_peft.options.erase import EraseConfig
from esd_peft.options.prompts import PromptOptions
from esd_peft.prompts.plan import PromptPlan
from esd_peft.runtime import distributed
from esd_peft.runtime.tracking import check_tracker


def check_environment(config: EraseConfig, device: torch.device) -> None:
    """Raise `UserError` if the output cannot be written, or a package or compiler that the options ask for is missing."""
    if distributed.is_main_process():
        checkpoint, inputs = config.checkpoint, [config.pretrained.model, config.pretrained.checkpoint_config]
        check_output(checkpoint.output, ADAPTER, checkpoint.overwrite or checkpoint.resume, inputs)
    check_tracker(config.runtime.report_to)
    check_bitsandbytes(device, config.memory.quantize, config.training.optimizer)
    check_compiler(config.runtime.compile, device)


def check_words(options: PromptOptions, validation_prompts: list[str], family: ModelFamily) -> None:
    """Raise `UserError` for words that an embedded pipeline does not know, before prompts are made of them."""
    if family.world is None:
        return
    for concept in options.concept:
        _check_words(family, "--concept", concept.name)
        for name in options.names_of(concept)[1:]:
            _check_words(family, "--also-erase", name)
        _check_words(family, "--erase-from", options.source_of(concept))
        _check_words(family, "--map-to", options.goal_of(concept) or "")
    for prompt in validation_prompts:
        _check_words(family, "--validation-prompt", prompt)
    check_concepts(family.world, [concept.name for concept in options.concept])


def check_model(config: EraseConfig, prompts: PromptPlan, family: ModelFamily) -> None:
    """Raise `UserError` for prompts that the model does not read to their end, and for a method that does not fit it."""
    if (config.buffer.guidance_scale or 0) > 1 and not family.takes_guidance:
        raise UserError(
            "--guidance-scale: this model is distilled to draw without classifier-free guidance; leave it out or use 1"
        )
    if config.training.method == "contrastive" and family.noise_schedule.predicts_noise:
        family.noise_schedule.alphas_cumprod()
    if config.buffer.num_inference_steps is not None:
        check_steps(family, config.buffer.num_inference_steps, "--num-inference-steps")
    given = _given_texts(config.prompts, prompts) | {"--validation-prompt": config.validation.validation_prompt}
    family.check_lengths(given)
    family.check_seen(given)
    for prompt in prompts.user_preserved if family.world is not None else []:
        _check_words(family, "--preserve", prompt)


def _given_texts(options: PromptOptions, prompts: PromptPlan) -> dict[str, list[str]]:
    """Return the texts of each option that are encoded."""
    concepts = options.concept
    goals = [f"{goal} {options.source_of(c)}".strip() for c in concepts if (goal := options.goal_of(c))]
    others = [name for names in prompts.synonyms for name in names]
    named = {"--concept": options.concept_names, "--also-erase": others, "--erase-from": options.sources}
    return named | {"--map-to": goals, "--preserve": prompts.user_preserved}


def _check_words(family: ModelFamily, option: str, text: str) -> None:
    if family.world is not None and (unseen := family.unseen_words(text)):
        known = ", ".join(labels[0] for labels in family.world.attributes.values())
        raise UserError(
            f"{option} {text!r}: {family.world.about} has never seen {', '.join(map(repr, unseen))}; "
            f"use its words ({known}, ...) or name your own pipeline with --model"
        )
