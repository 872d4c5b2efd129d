"""A dry run before any work: do the parts of a pipeline fit together, and is each asked all that it needs?

Networks are on the meta device, so nothing is computed in them and no weights are read.
"""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from esd_peft.errors import UserError, one_line
from esd_peft.models.family import ModelFamily
from esd_peft.models.parts import reading
from esd_peft.models.text_parts import plain_tokenizer
from esd_peft.runtime.memory_meter import track_memory

META = torch.device("meta")


def check_model(family: ModelFamily, weights: bool) -> None:
    """Raise `UserError` unless every part is whole and they work together; loads no weights, and without `weights` reads
    none."""
    parts = [family.part(name) for name in family.used if family.has(name)]
    for part in parts:
        if part.has_weights or "Scheduler" in part.family.__name__:
            part.check_config()
        if weights and part.has_weights:
            part.check_weights(merged=part.name == family.denoiser_part)
            if part.name == "vae":  # all others are checked as they are loaded; without images it never is
                part.check_values()
    dry_run(family)


@torch.no_grad()
def dry_run(family: ModelFamily) -> None:
    """Encode a prompt, take the scheduler's first steps, run the denoiser, decode. Raises `UserError` for the part that
    fails.
    """
    place = f"{family.option} {family.path}: its"
    with reading(f"{place} tokenizers and text encoders"):
        pipe = family.assemble(family.text_parts, torch.float32, empty=True)
        _check_vocabularies(family, pipe)
        with track_memory():  # on its terms networks run on the meta device
            embeds = family.encode_prompts(pipe, ["a picture"], META)
    denoiser = family.empty_denoiser()
    with reading(f"{place} {family.denoiser_part}"):
        latents = family.initial_latents(1, denoiser, torch.Generator())
    with reading(f"{place} scheduler"):
        timestep, inputs = _walk(family, latents, family.num_inference_steps, 2)
    kind = f"{place} {family.denoiser_part} is none that draws from noise and a prompt alone"
    with reading(kind, "name a text-to-image model"):
        prediction = family.predict(denoiser, inputs.to(META), timestep.expand(1).to(META), embeds)
    if prediction.shape != latents.shape:
        raise UserError(f"{kind}: from {_size(latents)} it makes {_size(prediction)}; name a text-to-image model")
    vae = family.empty_part("vae")
    with reading(f"{place} vae"):
        images = vae.decode(family.vae_latents(vae, latents.to(META)), return_dict=False)[0]
        if images.shape[-2:] != family.image_size(denoiser):
            raise ValueError(f"it makes images of {_size(images)} from latents of {_size(latents)}")


def check_steps(family: ModelFamily, steps: int, option: str, scheduler: str | None = None) -> None:
    """Raise `UserError` unless the scheduler completes a trajectory of that many steps.

    `scheduler` is a class of diffusers that replaces the pipeline's; `option` is the option that set the steps.
    """
    noise = family.initial_latents(1, family.empty_denoiser(), torch.Generator())
    try:
        _walk(family, noise, steps, steps, scheduler)
    except Exception as error:  # many kinds of errors: schedulers look up tables, and divide by differences of sigmas
        kind = scheduler or type(family.load_part("scheduler")).__name__
        raise UserError(
            f"{option} {steps}: the {kind} of {family.path} cannot take so many steps ({one_line(error)}); "
            f"use another number, {family.num_inference_steps} for example"
        ) from None


def _walk(family: ModelFamily, noise: Tensor, steps: int, count: int, kind: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the first timestep and the denoiser's input after `count` of `steps` steps, with a denoiser that returns zeros.

    Raises `ValueError` for NaN; schedulers raise other errors, too.
    """
    scheduler, latents = family.set_timesteps(noise, steps, kind)
    timesteps = scheduler.timesteps
    first = family.scale_input(scheduler, latents, timesteps[0])
    inputs = first
    for i, timestep in enumerate(timesteps[:count]):
        if i:
            inputs = family.scale_input(scheduler, latents, timestep)
        latents = family.scheduler_step(scheduler, torch.zeros_like(inputs), timestep, latents, torch.Generator())
    if not all(value.isfinite().all() for value in (timesteps.float(), first, latents)):
        raise ValueError("its steps lead to values that are not numbers, or infinite")
    return timesteps[0], first


def _check_vocabularies(family: ModelFamily, pipe: DiffusionPipeline) -> None:
    for part in family.text_parts:
        tokenizer, encoder = plain_tokenizer(getattr(pipe, part)), getattr(pipe, part.replace("tokenizer", "text_encoder"))
        if "tokenizer" not in part or tokenizer is None or encoder is None:
            continue
        rows = encoder.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise UserError(
                f"{family.option} {family.path}: its {part} has {len(tokenizer)} tokens and its text encoder {rows} "
                f"embeddings; save the text encoder after resize_token_embeddings, or restore the tokenizer"
            )


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape[1:]))
