"""Train the embedded pipeline and its classifier from nothing but rendered images.

    python benchmarks/train_shapes.py --output DIR

makes a plain `StableDiffusionPipeline` directory at DIR/pipeline, DIR/classifier.safetensors and
DIR/training.json (steps, losses and seconds of each stage). The stages run in the order of `StageName`;
`--stages` runs some of them again on top of what DIR holds.
"""

import copy
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTokenizer

import world_training
from esd_peft.options.base import Options
from esd_peft.options.command_line import parse, run_command
from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import ShapesClassifier
from world_training import (
    Fit,
    LatentPool,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    mean_of_last,
    save_pipeline,
    tokens,
    worn,
)

CONTEXT = 16  # tokens a prompt
POOL = 32768  # images whose latents the denoiser learns from
STEPS = {"vae": 1500, "classifier": 2000, "denoiser": 10000}
StageName = Literal["tokenizer", "vae", "classifier", "denoiser"]
Steps = Annotated[int, Field(ge=1, le=10**9)]


class TrainConfig(Options):
    """Train the embedded pipeline and its classifier from nothing but rendered images."""

    output: Path
    """Where the directory `pipeline`, classifier.safetensors and training.json (steps, losses, seconds) go."""
    stages: list[StageName] = [*get_args(StageName)]  # noqa: RUF012
    """The stages to run, on top of what the output holds; left out: all of them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed on the same machine trains the same weights."""
    vae_steps: Steps = STEPS["vae"]
    """Optimizer steps of the autoencoder."""
    classifier_steps: Steps = STEPS["classifier"]
    """Optimizer steps of the classifier."""
    denoiser_steps: Steps = STEPS["denoiser"]
    """Optimizer steps of the denoiser and the text encoder."""


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world's captions is one token."""
    words = {w for values in world.ATTRIBUTES.values() for w in values} | {world.NOUN}
    words |= {w for template in world.TEMPLATES for w in template.replace("{}", "").split()}
    return world_training.make_tokenizer(words, CONTEXT)


def train_vae(steps: int, generator: torch.Generator, batch: int = 32) -> tuple[AutoencoderKL, float | None]:
    """Reconstruct (L1 and L2), with a KL term small enough that textures survive."""
    vae = make_vae(world.SIZE).train()

    def loss_of() -> Tensor:
        pixels = world.sample(batch, generator)[1] * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        seen = vae.decode(posterior.sample(generator)).sample.float()
        error = seen - pixels
        return error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean()

    losses = list(Fit("vae", vae, steps, 2e-3, generator).run(loss_of))
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(world.sample(512, generator)[1] * 2 - 1).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, mean_of_last(losses)


def train_classifier(steps: int, generator: torch.Generator, batch: int = 64) -> tuple[ShapesClassifier, float | None]:
    """Cross-entropy over the three heads; on images that are worn as a decoder would."""
    classifier = ShapesClassifier().train()

    def loss_of() -> Tensor:
        labels, pixels = world.sample(batch, generator)
        logits = classifier(worn(pixels, generator))
        terms = [nn.functional.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits.values())]
        return torch.stack(terms).sum()

    losses = list(Fit("classifier", classifier, steps, 2e-3, generator).run(loss_of))
    return classifier.eval(), mean_of_last(losses)


def train_denoiser(
    steps: int, pipeline: Path, generator: torch.Generator, state: Path | None = None, batch: int = 48
) -> float | None:
    """Noise prediction with text encoder and UNet trained together, for the VAE and tokenizer in `pipeline`.

    Saves the whole pipeline, with moving averages of the two. It resumes from `state`, if that file exists.
    """
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32)
    scheduler = make_scheduler()
    model = nn.ModuleDict(
        {"unet": make_unet(world.SIZE, (64, 96), 128, (2, 3)), "text": make_text_encoder(tokenizer, 128, 512)}
    ).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    pool = LatentPool(vae, world.sample, generator, POOL)

    def loss_of() -> Tensor:
        labels, latents = pool.sample(batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        prompts = [world.caption(label, generator) for label in labels]
        embeds = model["text"](tokens(tokenizer, prompts)).last_hidden_state
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        seen = model["unet"](scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
        return nn.functional.mse_loss(seen.float(), noise)

    fit = Fit("denoiser", model, steps, 1e-3, generator, state, average=average)
    losses = [*fit.run(loss_of)]
    save_pipeline(pipeline, vae, average["text"], tokenizer, average["unet"])
    return mean_of_last(losses, 500)


def train(output: Path, chosen: list[str], steps: dict[str, int], seed: int) -> None:
    """Run the chosen stages, each from its own seed, and save after each.

    Raises `UserError` for a directory that this command did not make, or that another process writes.
    """
    pipeline = output / "pipeline"

    def tokenizer(generator: torch.Generator) -> None:
        make_tokenizer().save_pretrained(pipeline / "tokenizer")

    def vae(generator: torch.Generator) -> float | None:
        trained, loss = train_vae(steps["vae"], generator)
        trained.half().save_pretrained(pipeline / "vae")
        return loss

    def classifier(generator: torch.Generator) -> float | None:
        trained, loss = train_classifier(steps["classifier"], generator)
        trained.save(output / "classifier.safetensors")
        return loss

    def denoiser(generator: torch.Generator) -> float | None:
        return train_denoiser(steps["denoiser"], pipeline, generator, output / world_training.STATE)

    stages: dict[str, world_training.Stage] = {
        "tokenizer": tokenizer,
        "vae": vae,
        "classifier": classifier,
        "denoiser": denoiser,
    }
    world_training.run_stages(output, stages, chosen, steps, seed, torch.device("cpu"))


def main() -> None:
    config = parse(TrainConfig, "python benchmarks/train_shapes.py")
    train(config.output, [*config.stages], {stage: getattr(config, f"{stage}_steps") for stage in STEPS}, config.seed)


if __name__ == "__main__":
    run_command(main)
