"""The contrastive mode that some summaries of the paper describe. The paper contains none of it; see docs/objectives.md."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.models.family import index_embeds
from esd_peft.models.sampling import encode_prompts, make_images
from esd_peft.models.text_encoding import WHOLE, prompt_call
from esd_peft.prompts.table import PairTable
from esd_peft.runtime.devices import send
from esd_peft.runtime.seeds import generator as named_generator
from esd_peft.training.batch import Batch, Source
from esd_peft.training.learners import PREDICTION, Outputs
from esd_peft.training.rollout import Rollout

TEMPERATURE, NEGATIVE_WEIGHT, EPOCHS = 0.07, 0.5, 10
WEIGHT_DECAY = 1e-4
IMAGES = 64  # of a concept


def contrastive_loss(made: Outputs, batch: Batch) -> Tensor:
    """−log(e^{p/τ} / (e^{p/τ} + w·e^{n/τ})), p = cos(output, noise), n = cos(output, reference), τ = 0.07, w = 0.5.

    The output is the student's prediction for a noised reference image and the concept's prompt.
    """
    noise, reference = batch.teacher[PREDICTION].float().flatten(1).chunk(2)
    output = made[PREDICTION].float().flatten(1)
    positive = nn.functional.cosine_similarity(output, noise) / TEMPERATURE
    negative = nn.functional.cosine_similarity(output, reference) / TEMPERATURE + math.log(NEGATIVE_WEIGHT)
    return (batch.weight * (torch.logaddexp(positive, negative) - positive)).mean()


def epochs_of_references(batch_size: int, concepts: int) -> int:
    """Optimizer steps in which each variation of each reference image is seen once."""
    return math.ceil(concepts * IMAGES * EPOCHS / batch_size)


class ReferenceSamples(Source):
    """Batches of noised reference images, in random order, epoch after epoch."""

    def __init__(
        self, rollout: Rollout, table: PairTable, references: Tensor, batch_size: int, generator: torch.Generator
    ) -> None:
        """`references` `[concepts, N, ...]` are latents of the images in all their variations, on the CPU."""
        self.batch_size, self.generator, self.device = batch_size, generator, rollout.student.device
        self.references = references.flatten(0, 1)
        plain = send(torch.tensor([pairs[0] for pairs in table.concepts]), self.device)
        self.rows = table.prompts[plain].repeat_interleave(references.shape[1])
        self.embeds = table.embeds
        self.alphas_cumprod = rollout.student.family.noise_schedule.alphas_cumprod()
        self.order = torch.empty(0, dtype=torch.int64)  # what is left of this epoch

    def __next__(self) -> Batch:
        if not len(self.order):
            self.order = torch.randperm(len(self.references), generator=self.generator)
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        latents = self.references[chosen]
        noise = torch.randn(latents.shape, generator=self.generator)
        timesteps = torch.randint(len(self.alphas_cumprod), (len(chosen),), generator=self.generator)
        share = self.alphas_cumprod[timesteps].view(-1, *[1] * (latents.dim() - 1))
        noised = send(share.sqrt() * latents + (1 - share).sqrt() * noise, self.device)
        sides = send(torch.cat([noise, latents]), self.device)
        embeds = index_embeds(self.embeds, self.rows[send(chosen, self.device)])
        ones = torch.ones(len(chosen), device=self.device)
        samples = {"inputs": noised, "timesteps": send(timesteps, self.device)}
        return Batch(samples, embeds, {PREDICTION: sides}, ones, ones, num_concept_samples=len(chosen))

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        return {"generator": self.generator.get_state(), "order": self.order, "buffer": None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""
        self.generator.set_state(state["generator"])
        self.order = state["order"]
        if not set(self.order.tolist()) <= set(range(len(self.references))):
            raise ValueError("an order of other images")


def make_references(rollout: Rollout, concepts: list[str], seed: int, batch_size: int) -> Tensor:
    """Latents `[concepts, N, ...]` of images that the teacher makes, each augmented anew for every epoch.

    Raises `UserError` for a model that does not predict noise.
    """
    student, family = rollout.student, rollout.student.family
    if not family.noise_schedule.predicts_noise:
        raise UserError("--method contrastive compares with noise, which this model does not predict; use another --method")
    generator = named_generator(seed, "references")
    with rollout.profiler.phase("references"):
        prompts = encode_prompts(family, concepts, student.device, student.dtype)
        with student.teacher(), student.autocast():
            pipe = family.pipeline(student.denoiser, student.device, student.dtype)
            made = make_images(pipe, prompts, IMAGES, batch_size, seed, "references")
        count = made.shape[0] * made.shape[1]
        rollout.profiler.count("text encoders", {prompt_call(WHOLE): len(concepts) + 1})
        evaluations = 2 * family.num_inference_steps * count
        rollout.profiler.nfe += evaluations
        work = {"evaluation": evaluations, "decoded image": count, "encoded image": EPOCHS * count}
        rollout.profiler.count("trajectories", work)
        latents = []
        for images in made:
            varied = torch.cat([augment(images, generator) for _ in range(EPOCHS)])
            latents.append(family.encode_images(varied, generator, student.device))
    return torch.stack(latents)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop (80 to 100 % of each side, resized back), flip, and jitter brightness, contrast and saturation by up to 20 %.

    `[N, 3, H, W]` in [0, 1] to the same.
    """
    made = []
    for image in images:
        scale, top, left, flip, brightness, contrast, saturation = torch.rand(7, generator=generator).tolist()
        height, width = (max(1, round(side * (0.8 + 0.2 * scale))) for side in image.shape[1:])
        y, x = int(top * (image.shape[1] - height)), int(left * (image.shape[2] - width))
        cut = image[None, :, y : y + height, x : x + width]
        varied = nn.functional.interpolate(cut, image.shape[1:], mode="bilinear", antialias=True)[0]
        varied = varied.flip(2) if flip < 0.5 else varied
        varied = varied * (0.8 + 0.4 * brightness)
        for centre, amount in ((varied.mean(), contrast), (varied.mean(0, keepdim=True), saturation)):
            varied = centre + (varied - centre) * (0.8 + 0.4 * amount)
        made.append(varied.clamp(0, 1))
    return torch.stack(made)
