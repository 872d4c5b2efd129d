"""Train the emoji pipeline and its classifier from the drawings in this folder.

    python benchmarks/train_emoji.py --output DIR

makes a plain `StableDiffusionPipeline` directory at DIR/pipeline, DIR/classifier.safetensors and DIR/training.json (steps,
losses and seconds of each stage), in some hours on 2 CPU cores; stopped, it goes on where it was. As for Stable
Diffusion the text encoder is trained first, by contrast with images (CLIP, arXiv 2103.00020), and then frozen.
"""

import copy
import itertools
import json
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

import world_training
from esd_peft.options.base import Options
from esd_peft.options.command_line import parse, run_command
from esd_peft.prompts.plan import SCENES, TEMPLATES, retain_prompts
from esd_peft.runtime.devices import resolve_device
from esd_peft.worlds.emoji import pictures
from esd_peft.worlds.emoji.classifier import EmojiClassifier
from esd_peft.worlds.emoji.vocabulary import NAMES, Captions, all_words, with_article
from world_training import (
    Fit,
    LatentPool,
    make_scheduler,
    make_text_encoder,
    make_unet,
    make_vae,
    mean_of_last,
    replayed,
    save_pipeline,
    tokens,
    worn,
)

CONTEXT = 24  # tokens a prompt
TEXT_WIDTH = 256
LOGIT_SCALE = 20.0  # of the contrastive loss
POOL = 40960  # images whose latents the text encoder and the denoiser learn from
NEIGHBOURS = 10  # of a thing
STEPS = {"vae": 1500, "classifier": 2500, "text": 3000, "denoiser": 6500, "refine": 7156, "decoder": 3000}
StageName = Literal["tokenizer", "vae", "classifier", "text", "denoiser", "refine", "decoder", "neighbours"]
Steps = Annotated[int, Field(ge=1, le=10**9)]


class TrainConfig(Options):
    """Train the emoji pipeline and its classifier from what designers drew."""

    output: Path
    """Where the directory `pipeline`, classifier.safetensors and training.json (steps, losses, seconds) go."""
    stages: list[StageName] = [*get_args(StageName)]  # noqa: RUF012
    """The stages to run, on top of what the output holds; left out: all of them."""
    device: str = "auto"
    """auto (a GPU, where there is one), cpu, cuda, cuda:N, xpu or mps; what is drawn at random is the same on all."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed on the same machine trains the same weights."""
    vae_steps: Steps = STEPS["vae"]
    """Optimizer steps of the autoencoder."""
    classifier_steps: Steps = STEPS["classifier"]
    """Optimizer steps of the classifier."""
    text_steps: Steps = STEPS["text"]
    """Optimizer steps of the text encoder."""
    denoiser_steps: Steps = STEPS["denoiser"]
    """Optimizer steps of the denoiser."""
    refine_steps: Steps = STEPS["refine"]
    """More optimizer steps of the denoiser, from the average of the first ones."""
    decoder_steps: Steps = STEPS["decoder"]
    """Optimizer steps of the autoencoder's decoder, after the denoiser's."""


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of captions, and of the prompts that erasures use, is one token."""
    common = " ".join([*retain_prompts(), *TEMPLATES, *SCENES]).replace("{}", "")
    words = all_words() | {word.strip(",.;") for word in common.lower().split()} | {","}
    return world_training.make_tokenizer(words - {""}, CONTEXT, vocab_size=8192)


def train_vae(
    steps: int, generator: torch.Generator, state: Path, device: torch.device, batch: int = 32
) -> tuple[AutoencoderKL, float | None]:
    """Reconstruct (L1 and L2), with a KL term small enough that lines survive."""
    vae = make_vae(pictures.SIZE).to(device).train()

    def loss_of() -> Tensor:
        pixels = pictures.sample(batch, generator)[1].to(device) * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        seen = vae.decode(posterior.sample(generator)).sample
        error = seen - pixels
        return error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().float().mean()

    losses = list(Fit("vae", vae, steps, 2e-3, generator, state).run(loss_of))
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pictures.sample(512, generator)[1].to(device) * 2 - 1).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, mean_of_last(losses)


def train_decoder(
    steps: int, pipeline: Path, generator: torch.Generator, state: Path, device: torch.device, batch: int = 32
) -> float | None:
    """More steps for the autoencoder's decoder alone: latents stay what the denoiser learned. Differences of neighbouring
    pixels count too, which keeps lines sharp."""
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32).to(device).requires_grad_(False)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True).train()

    def loss_of() -> Tensor:
        pixels = pictures.sample(batch, generator)[1].to(device) * 2 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample(generator)
        seen = vae.decode(latents).sample
        error = seen - pixels
        edges = [error.diff(dim=axis).abs().mean() for axis in (2, 3)]
        return error.abs().mean() + error.square().mean() + edges[0] + edges[1]

    losses = list(Fit("decoder", decoder, steps, 1e-3, generator, state).run(loss_of))
    vae.eval().half().save_pretrained(pipeline / "vae")
    return mean_of_last(losses)


def train_classifier(
    steps: int, generator: torch.Generator, state: Path, device: torch.device, batch: int = 96
) -> tuple[EmojiClassifier, float | None]:
    """Cross-entropy over the heads; on images that are worn as a decoder would."""
    classifier = EmojiClassifier().to(device).train()

    def loss_of() -> Tensor:
        labels, pixels = pictures.sample(batch, generator)
        labels = labels.to(device)
        logits = classifier(worn(pixels, generator).to(device))
        terms = [functional.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits.values())]
        return torch.stack(terms).sum()

    losses = list(Fit("classifier", classifier, steps, 2e-3, generator, state).run(loss_of))
    return classifier.cpu().eval(), mean_of_last(losses)


class LatentTower(nn.Module):
    """The other half of CLIP: a latent `[B, 8, 8, 8]` to a vector `[B, width]`."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        sizes = (64, 128, 256)
        layers: list[nn.Module] = [nn.Conv2d(8, sizes[0], 3, padding=1), nn.GroupNorm(8, sizes[0]), nn.SiLU()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * sizes[-1], width))

    def forward(self, latents: Tensor) -> Tensor:
        """A vector of length 1 each."""
        return functional.normalize(self.body(latents), dim=-1)


def train_text_encoder(
    steps: int, pipeline: Path, generator: torch.Generator, state: Path, device: torch.device, batch: int = 128
) -> float | None:
    """CLIP's symmetric contrastive loss between captions and latents; saves the text encoder in `pipeline`."""
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32).to(device)
    pool, captions = LatentPool(vae, pictures.sample, generator, POOL // 2), Captions(generator)
    text, tower = make_text_encoder(tokenizer, TEXT_WIDTH, TEXT_WIDTH), LatentTower()
    project = nn.Linear(TEXT_WIDTH, 128, bias=False)
    model = nn.ModuleList([text, tower, project]).to(device).train()

    def loss_of() -> Tensor:
        labels, latents = pool.sample(batch, generator)
        # Tokens after a caption's end do not change its vector, so captions need no padding.
        caption_tokens = tokens(tokenizer, [captions(label) for label in labels], padding="longest")
        texts = functional.normalize(project(text(caption_tokens.to(device)).pooler_output), dim=-1)
        logits = LOGIT_SCALE * texts @ tower(latents).T
        target = torch.arange(batch, device=device)
        return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2

    losses = list(Fit("text", model, steps, 1e-3, generator, state).run(loss_of))
    text.eval().half().save_pretrained(pipeline / "text_encoder")
    return mean_of_last(losses)


def train_denoiser(
    steps: int,
    pipeline: Path,
    generator: torch.Generator,
    state: Path,
    device: torch.device,
    batch: int = 48,
    refine: bool = False,
) -> float | None:
    """Noise prediction by the UNet, for the other parts in `pipeline`; saves the whole, the UNet as its moving average.

    With `refine` it goes on from the UNet in `pipeline`, at a learning rate that starts anew (arXiv 1608.03983).
    """
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32).to(device)
    text = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).to(device).eval()
    scheduler = make_scheduler()
    unet = (
        UNet2DConditionModel.from_pretrained(pipeline / "unet", dtype=torch.float32)
        if refine
        else make_unet(pictures.SIZE, (80, 160), TEXT_WIDTH, (4, 5))
    )
    unet.to(device).train()
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    pool, captions = LatentPool(vae, pictures.sample, generator, POOL), Captions(generator)
    alphas = scheduler.alphas_cumprod
    # Min-SNR weighting (arXiv 2303.09556), by how often a timestep is drawn instead of by how much its loss counts.
    odds = (5 * (1 - alphas) / alphas).clamp(max=1)

    def inputs() -> tuple[tuple[Tensor, ...], Tensor]:
        labels, latents = pool.sample(batch, generator)
        with torch.no_grad():
            caption_tokens = tokens(tokenizer, [captions(label) for label in labels])
            embeds = text(caption_tokens.to(device)).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(device)
        timesteps = odds.multinomial(batch, replacement=True, generator=generator).to(device)
        return (scheduler.add_noise(latents, noise, timesteps), timesteps, embeds), noise

    denoise = replayed(unet, inputs()[0])

    def loss_of() -> Tensor:
        denoiser_inputs, noise = inputs()
        return functional.mse_loss(denoise(*denoiser_inputs), noise)

    losses = [*Fit("refine" if refine else "denoiser", unet, steps, 1e-3, generator, state, average=average).run(loss_of)]
    save_pipeline(pipeline, vae, text, tokenizer, average)
    return mean_of_last(losses, 500)


@torch.no_grad()
def find_neighbours(pipeline: Path, classifier: EmojiClassifier, generator: torch.Generator) -> dict[str, list[str]]:
    """Return the nearest labels of each thing, by the classifier's confusions and by name similarity in the text encoder,
    with equal weight.
    """
    confusions, image_counts = torch.zeros(len(NAMES), len(NAMES)), torch.zeros(len(NAMES), 1)
    for _ in range(40):
        labels, pixels = pictures.sample(512, generator)
        confusions.index_add_(0, labels[:, 0], classifier(worn(pixels, generator))["thing"].log_softmax(1))
        image_counts.index_add_(0, labels[:, 0], torch.ones(len(labels), 1))
    confusions = confusions / image_counts
    confusions = confusions - confusions.mean(1, keepdim=True)
    confusions = confusions - confusions.mean(0)  # subtract the mean: some names are likelier for every image
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    text = CLIPTextModel.from_pretrained(pipeline / "text_encoder", dtype=torch.float32).eval()
    embeds = text(tokens(tokenizer, [with_article(name) for name in NAMES])).pooler_output
    embeds = functional.normalize(embeds - embeds.mean(0), dim=1)
    others = ~torch.eye(len(NAMES), dtype=torch.bool)
    similarity = torch.stack([(x - x[others].mean()) / x[others].std() for x in (confusions, embeds @ embeds.T)]).sum(0)
    order = similarity.where(others, -torch.inf).argsort(1, descending=True)[:, :NEIGHBOURS]
    return {name: [NAMES[i] for i in row] for name, row in zip(NAMES, order.tolist(), strict=True)}


def train(output: Path, chosen: list[str], steps: dict[str, int], seed: int, device: torch.device) -> None:
    """Run the chosen stages, each from its own seed, and save after each.

    Raises `UserError` for a directory that this command did not make, or that another process writes.
    """
    pipeline, state = output / "pipeline", output / world_training.STATE

    def tokenizer(generator: torch.Generator) -> None:
        make_tokenizer().save_pretrained(pipeline / "tokenizer")

    def vae(generator: torch.Generator) -> float | None:
        trained, loss = train_vae(steps["vae"], generator, state, device)
        trained.half().save_pretrained(pipeline / "vae")
        return loss

    def classifier(generator: torch.Generator) -> float | None:
        trained, loss = train_classifier(steps["classifier"], generator, state, device)
        trained.save(output / "classifier.safetensors")
        return loss

    def text(generator: torch.Generator) -> float | None:
        return train_text_encoder(steps["text"], pipeline, generator, state, device)

    def denoiser(generator: torch.Generator) -> float | None:
        return train_denoiser(steps["denoiser"], pipeline, generator, state, device)

    def refine(generator: torch.Generator) -> float | None:
        return train_denoiser(steps["refine"], pipeline, generator, state, device, batch=96, refine=True)

    def decoder(generator: torch.Generator) -> float | None:
        return train_decoder(steps["decoder"], pipeline, generator, state, device)

    def neighbours(generator: torch.Generator) -> None:
        found = find_neighbours(pipeline, EmojiClassifier.load(output / "classifier.safetensors"), generator)
        rows = (f"  {json.dumps(name)}: {json.dumps(near)}" for name, near in found.items())
        (output / "neighbours.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")

    stages: dict[str, world_training.Stage] = {
        "tokenizer": tokenizer,
        "vae": vae,
        "classifier": classifier,
        "text": text,
        "denoiser": denoiser,
        "refine": refine,
        "decoder": decoder,
        "neighbours": neighbours,
    }
    world_training.run_stages(output, stages, chosen, steps, seed, device)


def main() -> None:
    """The command line."""
    config = parse(TrainConfig, "python benchmarks/train_emoji.py")
    steps = {stage: getattr(config, f"{stage}_steps") for stage in STEPS}
    train(config.output, [*config.stages], steps, config.seed, resolve_device(config.device))


if __name__ == "__main__":
    run_command(main)
