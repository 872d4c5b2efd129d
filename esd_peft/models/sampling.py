"""Images from a prompt and a seed, and grids of them."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from esd_peft.errors import UnusableImages
from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.family import index_embeds
from esd_peft.models.noise_schedule import as_kind
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.runtime.seeds import generator

_CAPTION, _GAP = 16, 4  # pixels
_PLAIN = 2  # of 255: an image whose channels vary by no more than that is of one colour
_FIX = (
    "so they show nothing and there is no verdict; --dtype float32 and bfloat16 overflow less than float16, and if that is "
    "not it, see what the model draws in diffusers"
)
SampleIndex = tuple[int, int]  # which prompt, which of its images


class EncodedPrompts:
    """Prompts as embeddings, to be drawn by `family.pipeline`, which has no text encoders.

    The embeddings, of the prompts, the negative prompts and the null prompt, wait in host memory: FLUX.1's take 4 MiB a
    prompt.
    """

    def __init__(
        self,
        family: ModelFamily,
        embeds: PromptEmbeds,
        device: torch.device,
        rows: dict[int, int] | None = None,
        negatives: Sequence[str] = (),
    ) -> None:
        self.family, self.embeds, self.device = family, {k: v.cpu() for k, v in embeds.items()}, device
        self.negatives = negatives
        self.rows = rows  # of prompts that go by other numbers than their places

    def __len__(self) -> int:
        return len(next(iter(self.embeds.values()))) - 1 - len(self.negatives)

    def arguments(self, numbers: list[int], negative: str = "") -> dict[str, Any]:
        """Return the arguments of the pipeline call for the prompts of these indices, with the same negative prompt for
        each.
        """
        other = len(self) + self.negatives.index(negative) if negative else -1
        if self.rows is not None:
            numbers = [self.rows[number] for number in numbers]
        prompts, null = (
            {name: value.to(self.device) for name, value in index_embeds(self.embeds, torch.tensor(rows)).items()}
            for rows in (numbers, [other] * len(numbers))
        )
        return self.family.pipeline_arguments(prompts, null)


def encode_prompts(
    family: ModelFamily, prompts: Sequence[str], device: torch.device, dtype: torch.dtype, negatives: Sequence[str] = ()
) -> EncodedPrompts:
    """The prompts, and those that are negative prompts of some, by text encoders that are loaded for them alone."""
    with TextEncoder(family, device, dtype) as encoder:
        return encode_with(encoder, prompts, negatives)


def encode_with(encoder: TextEncoder, prompts: Sequence[str], negatives: Sequence[str] = ()) -> EncodedPrompts:
    """The prompts, and those that are negative prompts of some, encoded once."""
    embeds = encoder.encode([*prompts, *negatives, ""])
    return EncodedPrompts(encoder.family, embeds, encoder.device, None, negatives)


@contextlib.contextmanager
def drawn_by(pipe: DiffusionPipeline, scheduler: str | None) -> Iterator[None]:
    """The pipeline with another scheduler (a class of diffusers), made of its own one's config."""
    own = pipe.scheduler
    pipe.scheduler = as_kind(own, scheduler)
    try:
        yield
    finally:
        pipe.scheduler = own


@torch.no_grad()
def image_batches(
    pipe: DiffusionPipeline, prompts: EncodedPrompts, places: Sequence[SampleIndex], batch_size: int, seed: int = 0,
    label: str = "images", first: int = 0, negative: str = "", bar: "tqdm[Any] | None" = None, **settings: Any,
) -> Iterator[tuple[Sequence[SampleIndex], Tensor]]:  # fmt: skip
    """Batches of places and their images `[B, 3, H, W]` fp32 in [0, 1] on the CPU.

    The noise of image k of prompt i depends only on `seed`, i and k, so that two models are compared on the same noise.
    `prompts` begin at index `first`; `settings` override the arguments of the pipeline call. Each batch advances `bar`, or a
    bar of its own.

    Raises `UnusableImages` for NaN, which a file would store as black; `check_images` checks all images of a model.
    """
    family = prompts.family
    if "guidance_scale" in settings:
        settings |= family.pipeline_guidance(settings.pop("guidance_scale"))
    with contextlib.nullcontext(bar) if bar is not None else image_bar(len(places), label) as shown:
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            noise = [generator(seed, f"picture/{i}/{k}") for i, k in batch]
            arguments = prompts.arguments([i - first for i, _ in batch], negative) | settings
            images = family.draw(pipe, **arguments, generator=noise).float().cpu()
            if not images.isfinite().all():
                raise UnusableImages(f"images ({label}) are NaN and no numbers, {_FIX}")
            shown.update(len(batch))
            yield batch, images


def image_bar(count: int, label: str) -> "tqdm[Any]":
    """A progress bar over so many images."""
    return tqdm(total=count, desc=f"images {label}", unit="image", leave=False)


def check_images(images: Iterable[Image.Image], label: str) -> None:
    """Raise `UnusableImages` if each of a model's images is of one colour, as they are where a VAE overflows; one of several
    may well be. Reads up to the first that is not."""
    if all(_of_one_colour(image) for image in images):
        raise UnusableImages(f"images ({label}) are each of one colour only, {_FIX}")


def _of_one_colour(image: Image.Image) -> bool:
    """Return whether an RGB image has a single colour."""
    extrema: Any = image.getextrema()  # of each channel
    return all(high - low <= _PLAIN for low, high in extrema)


def make_images(
    pipe: DiffusionPipeline, prompts: EncodedPrompts, seeds: int, batch_size: int, seed: int = 0, label: str = "images"
) -> Tensor:
    """`seeds` images of each prompt, `[prompts, seeds, 3, H, W]` fp32 in [0, 1], on the CPU; see `image_batches`."""
    places = [(i, k) for i in range(len(prompts)) for k in range(seeds)]
    images = torch.cat([images for _, images in image_batches(pipe, prompts, places, batch_size, seed, label)])
    check_images(map(to_image, images), label)
    return images.unflatten(0, (len(prompts), seeds))


Images = Sequence[Sequence[Image.Image]]  # of each prompt, for each seed


def before_after_grid(prompts: Sequence[str], before: Images, after: Images, height: int = 128) -> Image.Image:
    """One column a prompt: its name, then its images before, then the same seeds after."""
    seeds, first = len(before[0]), before[0][0]
    width = round(height * first.width / first.height)
    font = ImageFont.load_default(12)
    margin = 48
    block = seeds * (height + _GAP)
    sheet = Image.new("RGB", (margin + len(prompts) * (width + _GAP), _CAPTION + 2 * block + 2 * _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for half, name in enumerate(("before", "after")):
        draw.text((2, _CAPTION + half * (block + _GAP) + 2), name, "black", font)
    for column, prompt in enumerate(prompts):
        x = margin + column * (width + _GAP)
        draw.text((x, 1), _shortened(prompt, width, draw, font), "black", font)
        for half, images in enumerate((before, after)):
            top = _CAPTION + half * (block + _GAP)
            for k in range(seeds):
                tile = images[column][k].resize((width, height), Image.Resampling.LANCZOS)
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
