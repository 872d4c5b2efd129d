"""Pictures from a prompt and a seed, and grids of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from esd_peft.models import Backbone, PromptEmbeds
from esd_peft.models.family import pick
from esd_peft.runtime.seeds import generator

_CAPTION, _GAP = 16, 4  # pixels
Place = tuple[int, int]  # which prompt, which of its pictures


class EncodedPrompts:
    """Prompts as embeddings, to be drawn by `backbone.pipeline`, which has no text encoders.

    The embeddings, of the prompts and then of the null prompt, wait in host memory: FLUX.1's take 4 MiB a prompt.
    """

    def __init__(
        self, backbone: Backbone, embeds: PromptEmbeds, device: torch.device, rows: dict[int, int] | None = None
    ) -> None:
        self.backbone, self.embeds, self.device = backbone, {k: v.cpu() for k, v in embeds.items()}, device
        self.rows = rows  # of prompts that go by other numbers than their places

    def __len__(self) -> int:
        return len(next(iter(self.embeds.values()))) - 1

    def arguments(self, numbers: list[int]) -> dict[str, Any]:
        """What the pipeline is called with for the prompts of these numbers."""
        if self.rows is not None:
            numbers = [self.rows[number] for number in numbers]
        prompts, null = (
            {name: value.to(self.device) for name, value in pick(self.embeds, torch.tensor(rows)).items()}
            for rows in (numbers, [-1] * len(numbers))
        )
        return self.backbone.pipeline_arguments(prompts, null)


def encode_prompts(backbone: Backbone, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> EncodedPrompts:
    """The prompts, encoded once."""
    return EncodedPrompts(backbone, backbone.encode([*prompts, ""], device, dtype), device)


@torch.no_grad()
def picture_batches(
    pipe: DiffusionPipeline, prompts: EncodedPrompts, places: Sequence[Place], batch_size: int, seed: int = 0,
    label: str = "pictures", first: int = 0, **settings: Any,
) -> Iterator[tuple[Sequence[Place], Tensor]]:  # fmt: skip
    """Batches of places and their pictures `[B, 3, H, W]` fp32 in [0, 1] on the CPU.

    Picture k of prompt i starts from noise that depends on `seed`, i and k alone, so that two models are compared on
    the same noise. `prompts` are those from number `first` on; `settings` replace what the family calls its pipeline with.
    """
    for start in tqdm(range(0, len(places), batch_size), desc=label, leave=False):
        batch = places[start : start + batch_size]
        noise = [generator(seed, f"picture/{i}/{k}") for i, k in batch]
        arguments = prompts.arguments([i - first for i, _ in batch]) | settings
        yield batch, pipe(**arguments, generator=noise, output_type="pt").images.float().cpu()


def make_pictures(
    pipe: DiffusionPipeline, prompts: EncodedPrompts, seeds: int, batch_size: int, seed: int = 0, label: str = "pictures"
) -> Tensor:
    """`seeds` pictures of each prompt, `[prompts, seeds, 3, H, W]` fp32 in [0, 1], on the CPU; see `picture_batches`."""
    places = [(i, k) for i in range(len(prompts)) for k in range(seeds)]
    made = [pictures for _, pictures in picture_batches(pipe, prompts, places, batch_size, seed, label)]
    return torch.cat(made).unflatten(0, (len(prompts), seeds))


def before_after_grid(prompts: Sequence[str], before: Tensor, after: Tensor, height: int = 128) -> Image.Image:
    """One column a prompt: its name, then its pictures before, then the same seeds after. `[prompts, seeds, 3, H, W]`."""
    prompts_count, seeds = before.shape[:2]
    width = round(height * before.shape[-1] / before.shape[-2])
    font = ImageFont.load_default(12)
    margin = 48
    block = seeds * (height + _GAP)
    sheet = Image.new("RGB", (margin + prompts_count * (width + _GAP), _CAPTION + 2 * block + 2 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for half, name in enumerate(("before", "after")):
        draw.text((2, _CAPTION + half * (block + _GAP) + 2), name, "black", font)
    for column, prompt in enumerate(prompts):
        x = margin + column * (width + _GAP)
        draw.text((x, 1), _shortened(prompt, width, draw, font), "black", font)
        for half, pictures in enumerate((before, after)):
            top = _CAPTION + half * (block + _GAP)
            for k in range(seeds):
                tile = to_image(pictures[column, k]).resize((width, height), Image.Resampling.LANCZOS)
                sheet.paste(tile, (x, top + k * (height + _GAP)))
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """`[3, H, W]` in [0, 1]."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _shortened(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
