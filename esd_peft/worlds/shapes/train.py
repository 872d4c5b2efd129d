"""Train the embedded pipeline and its classifier from nothing but rendered images.

    python -m esd_peft.worlds.shapes.train --output DIR

makes a plain `StableDiffusionPipeline` directory at DIR/pipeline, DIR/classifier.safetensors and
DIR/training.json (steps, losses and seconds of each stage). The stages run in the order of `STAGES`;
`--stages` runs some of them again on top of what DIR holds.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from esd_peft.cli import parse, run_command
from esd_peft.errors import UserError
from esd_peft.io.jobs import hold
from esd_peft.io.outputs import settle, take_folder
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.text_parts import write_for_every_version
from esd_peft.options import Options
from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import Classifier

CONTEXT = 16  # tokens a prompt
STEPS = {"vae": 1500, "classifier": 2000, "denoiser": 10000}
STAGES = ("tokenizer", *STEPS)
Steps = Annotated[int, Field(ge=1, le=10**9)]


class TrainConfig(Options):
    """Train the embedded pipeline and its classifier from nothing but rendered images."""

    output: Path
    """Where the directory `pipeline`, classifier.safetensors and training.json (steps, losses, seconds) go."""
    stages: list[Literal["tokenizer", "vae", "classifier", "denoiser"]] = ["tokenizer", "vae", "classifier", "denoiser"]  # noqa: RUF012
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
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", show_progress=False)
    words = {w for values in world.ATTRIBUTES.values() for w in values} | {world.NOUN}
    words |= {w for template in world.TEMPLATES for w in template.replace("{}", "").split()}
    tokenizer.train_from_iterator([" ".join(sorted(words))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # any other text still has tokens, letter by letter
    tokens = [*letters, *(x + "</w>" for x in letters), *(left + right for left, right in merges), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)


def make_vae() -> AutoencoderKL:
    """32x32 images to 8x8 latents of 8 channels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=world.SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    """Two levels, cross-attention on both."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128,
        attention_head_dim=(2, 3),
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three layers of 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def fit(name: str, parameters: list[nn.Parameter], steps: int, lr: float, loss_of: Callable[[], Tensor]) -> Iterator[float]:
    """Minimise `loss_of()` with AdamW, a short warm-up and a cosine to zero; yields the loss of every step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    with tqdm(total=steps, desc=name, mininterval=5) as bar:
        for _ in range(steps):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            yield loss.item()


def train_vae(steps: int, generator: torch.Generator, batch: int = 32) -> tuple[AutoencoderKL, float]:
    """Reconstruct (L1 and L2), with a KL term small enough that textures survive."""
    vae = make_vae().train()

    def loss_of() -> Tensor:
        pixels = world.sample(batch, generator)[1] * 2 - 1
        posterior = vae.encode(pixels).latent_dist
        seen = vae.decode(posterior.sample(generator)).sample.float()
        error = seen - pixels
        return error.abs().mean() + error.square().mean() + 1e-5 * posterior.kl().mean()

    losses = list(fit("vae", list(vae.parameters()), steps, 2e-3, loss_of))
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(world.sample(512, generator)[1] * 2 - 1).latent_dist.sample(generator)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, sum(losses[-100:]) / 100


def train_classifier(steps: int, generator: torch.Generator, batch: int = 64) -> tuple[Classifier, float]:
    """Cross-entropy over the three heads; noise and blur stand in for what a decoder does to images."""
    classifier = Classifier().train()

    def loss_of() -> Tensor:
        labels, pixels = world.sample(batch, generator)
        soft = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pixels = pixels.lerp(soft, torch.rand(batch, 1, 1, 1, generator=generator))
        noise = torch.randn(pixels.shape, generator=generator) * 0.08
        logits = classifier(pixels + noise * torch.rand(batch, 1, 1, 1, generator=generator))
        terms = [nn.functional.cross_entropy(x, labels[:, i]) for i, x in enumerate(logits.values())]
        return torch.stack(terms).sum()

    losses = list(fit("classifier", list(classifier.parameters()), steps, 2e-3, loss_of))
    return classifier.eval(), sum(losses[-100:]) / 100


def train_denoiser(steps: int, pipeline: Path, generator: torch.Generator, batch: int = 48) -> float:
    """Noise prediction with text encoder and UNet trained together, for the VAE and tokenizer in `pipeline`.

    Saves the whole pipeline, with moving averages of the two, now and then.
    """
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae", dtype=torch.float32)
    scheduler = make_scheduler()
    model = nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(tokenizer)}).train()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    labels, means, stds = _latent_pool(vae, generator)

    def loss_of() -> Tensor:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        noise, jitter = torch.randn(2, batch, *means.shape[1:], generator=generator)
        latents = (means[chosen] + stds[chosen] * jitter) * vae.config.scaling_factor
        prompts = [world.caption(labels[i], generator) for i in chosen]
        tokens = tokenizer(prompts, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
        embeds = model["text"](tokens.input_ids).last_hidden_state
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator)
        seen = model["unet"](scheduler.add_noise(latents, noise, timesteps), timesteps, embeds).sample
        return nn.functional.mse_loss(seen.float(), noise)

    losses = []
    for i, loss in enumerate(fit("denoiser", list(model.parameters()), steps, 1e-3, loss_of)):
        losses.append(loss)
        decay = min(0.999, (i + 1) / (i + 10))
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - decay)
        if (i + 1) % 2000 == 0 or i + 1 == steps:
            save_pipeline(pipeline, vae, average["text"], tokenizer, average["unet"])
    return sum(losses[-500:]) / len(losses[-500:])


@torch.no_grad()
def _latent_pool(vae: AutoencoderKL, generator: torch.Generator, size: int = 32768) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, means and standard deviations of `size` encoded images, so that the encoder runs once."""
    parts = []
    for _ in tqdm(range(size // 128), desc="encode"):
        labels, pixels = world.sample(128, generator)
        posterior = vae.encode(pixels * 2 - 1).latent_dist
        parts.append((labels, posterior.mean, posterior.std))
    labels, means, stds = (torch.cat(column) for column in zip(*parts, strict=True))
    return labels, means, stds


def save_pipeline(
    path: Path, vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> None:
    """Write a plain diffusers directory in fp16; the given modules stay as they are."""
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(text),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.vae.register_to_config(_name_or_path="")  # where it lay while training is nobody's business
    pipe.to(torch.float16).save_pretrained(path)
    write_for_every_version(path)


def train(output: Path, stages: list[str], steps: dict[str, int], seed: int) -> None:
    """Run the chosen stages, each from its own seed, and save after each.

    Raises `UserError` for a directory that this command did not make, or that another process writes.
    """
    with hold(output):
        take_folder(output)
        _train(output, stages, steps, seed)


def _train(output: Path, stages: list[str], steps: dict[str, int], seed: int) -> None:
    pipeline, log = output / "pipeline", output / "training.json"
    try:
        record = {**read_json(log)} if log.exists() else {}
    except (UnreadableError, TypeError) as error:
        raise UserError(f"--output {output}: {log} is damaged ({error}); remove it") from None
    for index, stage in enumerate(STAGES):
        if stage not in stages:
            continue
        torch.manual_seed(seed + index)  # weight initialisation
        generator = torch.Generator().manual_seed(seed + index)
        started = time.perf_counter()
        loss = None
        if stage == "tokenizer":
            make_tokenizer().save_pretrained(pipeline / "tokenizer")
        elif stage == "vae":
            vae, loss = train_vae(steps[stage], generator)
            vae.half().save_pretrained(pipeline / "vae")
        elif stage == "classifier":
            classifier, loss = train_classifier(steps[stage], generator)
            classifier.save(output / "classifier.safetensors")
        else:
            loss = train_denoiser(steps[stage], pipeline, generator)
        seconds = round(time.perf_counter() - started, 1)
        record[stage] = {"steps": steps.get(stage), "loss": loss, "seconds": seconds, "threads": torch.get_num_threads()}
        record["seed"] = seed
        log.write_text(json.dumps(record, indent=2) + "\n")
        settle(output)


def main() -> None:
    config = parse(TrainConfig, "worlds.shapes.train")
    train(config.output, [*config.stages], {stage: getattr(config, f"{stage}_steps") for stage in STEPS}, config.seed)


if __name__ == "__main__":
    run_command(main)
