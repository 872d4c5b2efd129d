"""The contrastive mode that some summaries of the paper describe. The paper contains none of it; see docs/objectives.md."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from esd_peft.errors import UserError
from esd_peft.io.images import read_pictures
from esd_peft.models.family import pick
from esd_peft.models.sampling import encode_prompts, make_pictures
from esd_peft.runtime.devices import send
from esd_peft.training.esd import Batch, Objective, Supply
from esd_peft.training.rollout import Rollout

TEMPERATURE, NEGATIVE_WEIGHT, EPOCHS = 0.07, 0.5, 10
PICTURES = 64  # of a concept, where the teacher makes them


@dataclass
class Contrastive(Objective):
    """−log(e^{p/τ} / (e^{p/τ} + w·e^{n/τ})), p = cos(output, noise), n = cos(output, reference), τ = 0.07, w = 0.5.

    The output is the student's prediction for a noised reference picture and the concept's prompt.
    """

    weight_decay: ClassVar[float] = 1e-4
    train_batch_size: ClassVar[int] = 32

    rollout: Rollout
    references: Tensor  # [concepts, N, ...] latents of reference pictures in all their variations, on the CPU

    @property
    def learning_rate(self) -> float:
        return 1e-4

    @property
    def steps(self) -> int:
        """Each variation once."""
        return math.ceil(self.references.shape[0] * self.references.shape[1] / self.batch_size)

    def batches(self, generator: torch.Generator, resume: Supply | None = None) -> Iterator[Batch]:
        return itertools.islice(self._batches(generator), resume.taken if resume else 0, None)

    def _batches(self, generator: torch.Generator) -> Iterator[Batch]:
        rollout, size = self.rollout, self.batch_size
        kept = rollout.backbone.noise_schedule.alphas_cumprod()
        flat = self.references.flatten(0, 1)
        plain = send(torch.tensor([pairs[0] for pairs in rollout.table.concepts]), rollout.device)
        rows = rollout.table.prompts[plain].repeat_interleave(self.references.shape[1])
        while True:
            for chosen in torch.randperm(len(flat), generator=generator).split(size):
                latents = flat[chosen]
                noise = torch.randn(latents.shape, generator=generator)
                timesteps = torch.randint(len(kept), (len(chosen),), generator=generator)
                share = kept[timesteps].view(-1, *[1] * (latents.dim() - 1))
                noised = send(share.sqrt() * latents + (1 - share).sqrt() * noise, rollout.device)
                sides = send(torch.cat([noise, latents]), rollout.device)
                embeds = pick(rollout.table.embeds, rows[send(chosen, rollout.device)])
                ones = torch.ones(len(chosen), device=rollout.device)
                yield Batch(noised, send(timesteps, rollout.device), embeds, sides, ones, ones, erasing=len(chosen))

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        noise, reference = batch.teacher.float().flatten(1).chunk(2)
        answer = prediction.float().flatten(1)
        positive = nn.functional.cosine_similarity(answer, noise) / TEMPERATURE
        negative = nn.functional.cosine_similarity(answer, reference) / TEMPERATURE + math.log(NEGATIVE_WEIGHT)
        return (batch.weight * (torch.logaddexp(positive, negative) - positive)).mean()


def make_contrastive(rollout: Rollout, generator: torch.Generator) -> Contrastive:
    """With reference pictures from the config's folder, or made by the teacher; each is augmented anew for every epoch.

    Raises `UserError` if the folder holds no picture that can be read.
    """
    config, backbone = rollout.config, rollout.backbone
    if not backbone.noise_schedule.predicts_noise:
        raise UserError("--objective contrastive compares with noise, which a v-prediction model does not predict; use esd")
    with rollout.costs.phase("references"):
        if config.reference is not None:
            made = read_pictures(config.reference, backbone.picture_size(rollout.denoiser), "--reference").unsqueeze(0)
        else:
            prompts = encode_prompts(backbone, config.concept_names, rollout.device, rollout.dtype)
            with rollout.teacher(), rollout.autocast():
                pipe = backbone.pipeline(rollout.denoiser, rollout.device, rollout.dtype)
                made = make_pictures(pipe, prompts, PICTURES, config.rollout_batch_size, config.seed, "references")
            rollout.costs.forward_equivalents += 2 * backbone.num_inference_steps * made.shape[0] * made.shape[1]
        latents = []
        for pictures in made:
            varied = torch.cat([augment(pictures, generator) for _ in range(EPOCHS)])
            latents.append(backbone.encode_pictures(varied, generator, rollout.device))
    return Contrastive(rollout, torch.stack(latents))


def augment(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Crop (80 to 100 % of each side, resized back), flip, and jitter brightness, contrast and saturation by up to 20 %.

    `[N, 3, H, W]` in [0, 1] to the same.
    """
    made = []
    for picture in pictures:
        scale, top, left, flip, brightness, contrast, saturation = torch.rand(7, generator=generator).tolist()
        height, width = (max(1, round(side * (0.8 + 0.2 * scale))) for side in picture.shape[1:])
        y, x = int(top * (picture.shape[1] - height)), int(left * (picture.shape[2] - width))
        cut = picture[None, :, y : y + height, x : x + width]
        varied = nn.functional.interpolate(cut, picture.shape[1:], mode="bilinear", antialias=True)[0]
        varied = varied.flip(2) if flip < 0.5 else varied
        varied = varied * (0.8 + 0.4 * brightness)
        for centre, amount in ((varied.mean(), contrast), (varied.mean(0, keepdim=True), saturation)):
            varied = centre + (varied - centre) * (0.8 + 0.4 * amount)
        made.append(varied.clamp(0, 1))
    return torch.stack(made)
