"""Short draws of teacher and student, and the teacher as their judge.

The judge is a diffusion classifier (arXiv 2303.16203): of several prompts a draw shows the one with which the teacher
predicts best what noise was added to it. It needs no classifier and no image, and works for every family.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esd_peft.models import PromptEmbeds
from esd_peft.models.family import in_its_dtype, index_embeds
from esd_peft.runtime import distributed
from esd_peft.runtime.devices import send
from esd_peft.runtime.seeds import generator
from esd_peft.training.student import Student

STEPS = 8  # of a draw
LEVELS = (0.3, 0.5)  # shares of the training timesteps at which the judge adds noise


@dataclass(frozen=True)
class Draw:
    """One picture to draw: its prompt, and the prompts among which the judge decides."""

    prompt: str
    candidates: tuple[str, ...]  # the first one is what is asked for: the concept, or the prompt's own subject


@dataclass
class EncodedTexts:
    """Texts and their embeddings, in host memory."""

    rows: dict[str, int] = field(default_factory=dict)
    embeds: PromptEmbeds = field(default_factory=dict)  # [texts, ...] each

    def add(self, texts: Sequence[str], embeds: PromptEmbeds) -> None:
        """Take over the texts that are new, with their rows of `embeds`."""
        new = [i for i, text in enumerate(texts) if text not in self.rows and text not in texts[:i]]
        if not new:
            return
        some = {name: value[torch.tensor(new)].cpu() for name, value in embeds.items()}
        self.embeds = {k: torch.cat([self.embeds[k], value]) if self.embeds else value for k, value in some.items()}
        self.rows |= {texts[i]: len(self.rows) + number for number, i in enumerate(new)}

    def get(self, texts: Sequence[str], device: torch.device) -> PromptEmbeds:
        """The embeddings of `texts` on `device`."""
        some = index_embeds(self.embeds, torch.tensor([self.rows[text] for text in texts]))
        return {name: send(value, device) for name, value in some.items()}


@dataclass
class Judge:
    """Draws with `student` as it is, and judges with its teacher."""

    student: Student
    texts: EncodedTexts
    guidance_scale: float
    batch_size: int  # predictions at a time
    seed: int
    nfe: int = 0

    @torch.no_grad()
    def draw(self, draws: Sequence[Draw]) -> Tensor:
        """The final latents `[N, ...]` of each draw, fp32 on the CPU. The noise that they begin with depends on the seed."""
        student, made, size = self.student, [], max(1, self.batch_size // 2)
        noise = student.family.initial_latents(len(draws), student.denoiser, generator(self.seed, "diagnosis/noise"))
        for start in range(0, len(draws), size):
            some = slice(start, start + size)
            made.append(self._draw(draws[some], noise[some], generator(self.seed, f"diagnosis/draw/{start}")))
        return torch.cat(made)

    def _draw(self, draws: Sequence[Draw], noise: Tensor, draws_of_steps: torch.Generator) -> Tensor:
        family, device, guided = self.student.family, self.student.device, self.guidance_scale != 1
        scheduler, latents = family.set_timesteps(noise, min(STEPS, family.num_inference_steps))
        latents, timesteps = send(latents, device), send(scheduler.timesteps, device)
        texts = [draw.prompt for draw in draws]
        embeds = self.texts.get([*[""] * len(texts), *texts] if guided else texts, device)
        for i, timestep in enumerate(scheduler.timesteps):
            distributed.stop_together()
            inputs = family.scale_input(scheduler, latents, timestep)
            both = inputs.repeat(2, *[1] * (inputs.dim() - 1)) if guided else inputs
            predicted = self.student.predict(both, timesteps[i].expand(len(both)), embeds).float()
            self.nfe += len(both)
            if guided:
                null, towards = predicted.chunk(2)
                predicted = family.guide(null, towards, self.guidance_scale)
            latents = family.scheduler_step(scheduler, predicted, timestep, latents, draws_of_steps)
        return latents.float().cpu()

    @torch.no_grad()
    def shows_first(self, latents: Tensor, draws: Sequence[Draw]) -> list[bool]:
        """Return for each of the `latents` `[N, ...]` whether the teacher finds the first of its draw's candidates in it."""
        schedule, device = self.student.family.noise_schedule, self.student.device
        pairs = [(i, text) for i, draw in enumerate(draws) for text in draw.candidates]
        errors = torch.zeros(len(pairs))
        noise = torch.randn(latents.shape, generator=generator(self.seed, "diagnosis/judge"))
        for level in LEVELS:
            noisy, timesteps, right = schedule.add_noise(latents, noise, torch.full((len(latents),), level))
            for part in torch.arange(len(pairs)).split(self.batch_size):
                distributed.stop_together()
                some = [pairs[i] for i in part.tolist()]
                at = torch.tensor([i for i, _ in some])
                embeds = self.texts.get([text for _, text in some], device)
                with self.student.teacher():
                    predicted = self.student.predict(send(noisy[at], device), send(timesteps[at], device), embeds)
                errors[part] += (predicted.float().cpu() - right[at]).flatten(1).square().mean(dim=1)
                self.nfe += len(part)
        return [int(own.argmin()) == 0 for own in errors.split([len(draw.candidates) for draw in draws])]


@torch.no_grad()
def decode(student: Student, latents: Tensor) -> Tensor:
    """Images `[N, 3, H, W]` fp32 in [0, 1] of final latents `[N, ...]`, on the CPU; of a video its first frame."""
    family = student.family
    dtype = family.decoding_dtype(student.dtype)
    vae = in_its_dtype(family.load_part("vae", dtype).to(student.device))
    images = []
    for latent in latents.split(1):  # one at a time: at 512² each takes about a gigabyte
        image = vae.decode(family.vae_latents(vae, send(latent, student.device).to(dtype)), return_dict=False)[0]
        images.append((image[:, :, 0] if image.dim() == 5 else image).float().cpu())
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)
