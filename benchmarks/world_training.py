"""Common parts of the training commands: a tokenizer of the words, an optimizer loop that resumes, stages."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from esd_peft.errors import UserError
from esd_peft.io import marks
from esd_peft.io.jobs import lock_output
from esd_peft.io.outputs import check_folder, new_file, settle, take_folder
from esd_peft.io.paths import exists, is_file
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.text_parts import write_for_every_version
from esd_peft.runtime.devices import describe_device, graphed, is_accelerator

STATE = "state.pt"  # of a stage that is under way
_WORLD = "a trained world"  # kind of the output
SampleImages = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # labels `[B, domains]`, pixels in [0, 1]
Stage = Callable[[torch.Generator], float | None]  # trains, saves, and returns its last loss


def make_tokenizer(words: Iterable[str], context: int, vocab_size: int = 4096) -> CLIPTokenizer:
    """A CLIP tokenizer of `context` tokens a prompt, in which each of the `words` is one token; others are spelled."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([" ".join(sorted(words))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # any other text still has tokens, letter by letter
    tokens = [*letters, *(x + "</w>" for x in letters), *(left + right for left, right in merges), start, end]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=context)


def tokens(tokenizer: CLIPTokenizer, prompts: list[str], padding: str = "max_length") -> Tensor:
    """Their tokens `[B, length]`; the padding is that of transformers."""
    most = tokenizer.model_max_length
    padded = tokenizer(prompts, padding=padding, max_length=most, truncation=True, return_tensors="pt")
    return padded.input_ids


def make_text_encoder(tokenizer: CLIPTokenizer, width: int, hidden: int) -> CLIPTextModel:
    """CLIP's, of three layers of that width, with so many hidden units in each."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae(image_size: int) -> AutoencoderKL:
    """Images of so many pixels a side to latents of 8 channels, a quarter as wide and high."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=image_size,
    )


def make_unet(image_size: int, channels: tuple[int, int], text_width: int, heads: tuple[int, int]) -> UNet2DConditionModel:
    """Two levels of so many `channels`, cross-attention on both with so many `heads`, for the latents of `make_vae`."""
    return UNet2DConditionModel(
        sample_size=image_size // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        norm_num_groups=16,
    )


class LatentPool:
    """Labels and latents of `size` images that `sample` makes, so that the autoencoder runs once.

    Latents are on the autoencoder's device. All random numbers are drawn on the CPU, there and in the rest of the trainings:
    a seed gives the same data on every device.
    """

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, sample: SampleImages, generator: torch.Generator, size: int) -> None:
        parts = []
        for _ in tqdm(range(size // 128), desc="encode", mininterval=5):
            labels, pixels = sample(128, generator)
            posterior = vae.encode(pixels.to(vae.device) * 2 - 1).latent_dist
            parts.append((labels, posterior.mean, posterior.std))
        self.labels, self.means, self.stds = (torch.cat(column) for column in zip(*parts, strict=True))
        self.scale = vae.config.scaling_factor

    def sample(self, count: int, generator: torch.Generator) -> tuple[list[list[int]], Tensor]:
        """Labels and scaled latents `[count, 8, H, W]` of some of the images."""
        chosen = torch.randint(len(self.labels), (count,), generator=generator)
        jitter = torch.randn(count, *self.means.shape[1:], generator=generator).to(self.means.device)
        return self.labels[chosen].tolist(), (self.means[chosen] + self.stds[chosen] * jitter) * self.scale


def worn(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Add random noise and blur to images `[B, 3, H, W]`, to imitate the artefacts of a decoder."""
    soft = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pixels = pixels.lerp(soft, torch.rand(len(pixels), 1, 1, 1, generator=generator))
    noise = torch.randn(pixels.shape, generator=generator) * 0.08
    return pixels + noise * torch.rand(len(pixels), 1, 1, 1, generator=generator)


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


def replayed(unet: UNet2DConditionModel, sample: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The UNet as a function of latents, timesteps and embeddings, all shaped like those of `sample`.

    On a GPU it is a CUDA graph, gradients included: to start the operations of so small a network one by one takes several
    times as long as they do.
    """

    class Denoise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
            seen: Tensor = self.unet(latents, timesteps, embeds, return_dict=False)[0]
            return seen

    denoise = Denoise()
    graphed(denoise, sample)
    return denoise


@dataclass
class Fit:
    """AdamW with a short warm-up and a cosine to zero.

    With a `state` file it is written every `save_every` steps, and a fit that finds one goes on with it, with the same bits
    as if it had not been stopped. `average`, where given, follows the model as a moving average.
    """

    name: str
    model: nn.Module
    steps: int
    lr: float
    generator: torch.Generator  # of all that the loss draws
    state: Path | None = None  # in the folder that `run_stages` took
    save_every: int = 500
    average: nn.Module | None = None

    def run(self, loss_of: Callable[[], Tensor]) -> Iterator[float]:
        """Minimise `loss_of()`; yields the loss of every step that is made now."""
        parameters = list(self.model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01, fused=is_accelerator(parameters[0].device))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(1, (i + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * i / self.steps))
        )
        parts: dict[str, Any] = {"model": self.model, "optimizer": optimizer, "schedule": schedule}
        if self.average is not None:
            parts["average"] = self.average
        first = self._restore(parts)
        with tqdm(total=self.steps, initial=first, desc=self.name, mininterval=5) as bar:
            for i in range(first, self.steps):
                loss = loss_of()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                self._follow(i)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
                yield loss.item()
                if self.state is not None and (i + 1) % self.save_every == 0 and i + 1 < self.steps:
                    self._save(parts, i + 1)
        if self.state is not None:
            self.state.unlink(missing_ok=True)

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        if self.average is None:
            return
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def _save(self, parts: dict[str, Any], step: int) -> None:
        assert self.state is not None
        saved = {name: part.state_dict() for name, part in parts.items()}
        with new_file(self.state) as draft:
            torch.save(saved | {"step": step, "of": [self.name, self.steps], "generator": self.generator.get_state()}, draft)

    def _restore(self, parts: dict[str, Any]) -> int:
        if self.state is None or not exists(self.state):
            return 0
        saved = torch.load(self.state, map_location="cpu", weights_only=True)
        if saved["of"] != [self.name, self.steps]:
            raise UserError(f"{self.state} is of another training ({saved['of']}); remove it, or train as then")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        self.generator.set_state(saved["generator"])
        return int(saved["step"])


def mean_of_last(losses: list[float], count: int = 100) -> float | None:
    """The mean of the last losses; none where nothing was left to do."""
    return sum(losses[-count:]) / len(losses[-count:]) if losses else None


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
    pipe.vae.register_to_config(_name_or_path="")  # no local path in the published files
    pipe.to(torch.float16).save_pretrained(path)
    write_for_every_version(path)


def run_stages(
    output: Path,
    stages: dict[str, Stage],
    chosen: list[str],
    steps: dict[str, int],
    seed: int,
    device: torch.device,
) -> None:
    """Run the chosen stages, each from its own seed, and save after each; training.json gets steps, losses and seconds.

    Raises `UserError` for a directory that this command did not make, or that another process writes.
    """
    with lock_output(output):
        log = output / "training.json"
        check_folder(output, _WORLD, writes=[log.name, STATE])
        take_folder(output, _WORLD)
        recorded = marks.recorded(output) or set()
        others = {
            path for path in output.rglob("*") if is_file(path) and path.relative_to(output).as_posix() not in recorded
        }
        try:
            record = {**read_json(log)} if exists(log) else {}
        except (UnreadableError, TypeError) as error:
            raise UserError(f"--output {output}: {log} is damaged ({error}); remove it") from None
        for index, (stage, train) in enumerate(stages.items()):
            if stage not in chosen:
                continue
            torch.manual_seed(seed + index)  # weight initialisation
            started = time.perf_counter()
            loss = train(torch.Generator().manual_seed(seed + index))
            seconds = round(time.perf_counter() - started, 1)
            where = describe_device(device)
            record[stage] = {"steps": steps.get(stage), "loss": loss, "seconds": seconds, "device": where}
            record["seed"] = seed
            with new_file(log) as draft:
                draft.write_text(json.dumps(record, indent=2) + "\n")
            settle(output, but=others)
