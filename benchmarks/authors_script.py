"""One training iteration as the ESD authors' current script makes it, to be timed beside ours.

As read in their code: two whole denoisers and everything else in bfloat16, Adam on the weights themselves without float32
copies, x_t sampled anew with the frozen base for every iteration of batch 1 (50 steps, up to a random one, here the middle
one; classifier-free guidance in one batch), gradients for every weight although cross-attention alone is updated. Prompts
are encoded once here, and in theirs anew every time, which is left out to their advantage.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, ModelMixin

from esd_peft.models import open_family
from esd_peft.models.family import PromptEmbeds
from esd_peft.runtime.devices import finish

STEPS, SAMPLED, GUIDANCE = 50, 24, 3.0


def seconds_an_iteration(path: Path, device: torch.device, count: int = 3) -> float:
    """Return the mean seconds of iterations that sample to the middle of the trajectory, after one warm-up."""
    iterate, _ = make_iteration(path, device)
    iterate()
    finish(device)
    start = time.perf_counter()
    for _ in range(count):
        iterate()
    finish(device)
    return (time.perf_counter() - start) / count


def make_iteration(
    path: Path, device: torch.device, steps: int = STEPS, sampled: int = SAMPLED
) -> tuple[Callable[[], None], ModelMixin]:
    """An iteration for the model in the directory `path`, and the student that it trains."""
    family = open_family(str(path))
    embeds = family.encode(["", "circle"], device, torch.bfloat16)
    base, student = (family.load_denoiser(torch.bfloat16).to(device) for _ in range(2))
    student.requires_grad_(True)
    optimizer = torch.optim.Adam([p for name, p in student.named_parameters() if "attn2" in name], lr=5e-5)
    scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
    scheduler.set_timesteps(steps)
    noise = family.initial_latents(1, student, torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def predict(denoiser, latents, timestep, rows: list[int]):
        prompt_embeds: PromptEmbeds = {name: value[rows] for name, value in embeds.items()}
        times = timestep.to(device).expand(len(rows))
        return family.predict(denoiser, latents.repeat(len(rows), 1, 1, 1), times, prompt_embeds)

    def iterate() -> None:
        latents = noise
        with torch.no_grad():
            for timestep in scheduler.timesteps[:sampled]:
                null, concept = predict(base, latents, timestep, [0, 1]).chunk(2)
                latents = scheduler.step(null + GUIDANCE * (concept - null), timestep, latents).prev_sample
            timestep = scheduler.timesteps[sampled]
            null, concept = predict(base, latents, timestep, [0, 1]).chunk(2)
        prediction = predict(student, latents, timestep, [1])
        loss = (prediction - (concept - 2 * (concept - null))).square().mean()  # their η of 2, anchored at e_concept
        loss.backward()
        optimizer.step()
        student.zero_grad()

    return iterate, student
