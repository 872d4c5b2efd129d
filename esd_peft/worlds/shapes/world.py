"""The shapes benchmark: labels, renderer and captions of the embedded pipeline.

An image holds one shape, in one colour, with one texture, on a grey ground. Everything is drawn
from a named `torch.Generator`, so a seed gives the same images and captions everywhere.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
TEXTURES = ("solid", "striped", "dotted", "checkered")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}

SIZE = 32  # pixels a side
TEMPLATES = ("{}", "a {}", "the {}", "one {}", "a picture of a {}", "a drawing of a {}", "a photo of a {}")
WORDINGS = (
    "a {}",
    "the {}",
    "one {}",
    "a drawing of a {}",
    "a photo of a {}",
)  # templates of full prompts, none of which occurs in training
TEMPLATE_WEIGHTS = (6, 8, 1, 1, 2, 1, 1)
NOUN = "shape"  # replaces a dropped shape name

_SUPERSAMPLE = 3
_DARK = 0.1  # the second tone of every texture
_RGB = torch.tensor(
    [[0.86, 0.12, 0.12], [0.95, 0.85, 0.10], [0.10, 0.62, 0.20], [0.15, 0.80, 0.90], [0.12, 0.22, 0.88], [0.65, 0.18, 0.80]]
)


def full_prompts() -> list[str]:
    """Every prompt that names all three attributes, "a striped red circle" for example: 144 of them."""
    return [prompt({"shape": s, "colour": c, "texture": t}) for s in SHAPES for c in COLOURS for t in TEXTURES]


def prompt(named: dict[str, str], template: str = "a {}") -> str:
    """The caption for the attributes in `named` (keys of `ATTRIBUTES`); "" for none."""
    if not named:
        return ""
    words = [named[kind] for kind in ("texture", "colour") if kind in named]
    if "shape" in named or template != "{}":
        words.append(named.get("shape", NOUN))
    return template.format(" ".join(words))


def prompt_templates(texts: list[str]) -> list[Callable[[str], str]]:
    """Return prompt templates: bare ones, and ones with an attribute of a kind that no text of `texts` names.

    Each maps a text ("" for none) to a prompt: "circle" to "a circle", "a red circle", ...
    """
    bare = [functools.partial(_say, {}, template) for template in ("{}", "a {}", "a picture of a {}")]
    return [*bare, *(functools.partial(_say, context, "a {}") for context in _free(texts))]


def _say(context: dict[str, str], template: str, text: str) -> str:
    return prompt({**context, **attributes_in(text)}, template)


def _free(texts: list[str]) -> list[dict[str, str]]:
    """Every attribute of the kinds that none of `texts` names."""
    taken = {kind for text in texts for kind in attributes_in(text)}
    return [{kind: value} for kind, values in ATTRIBUTES.items() if kind not in taken for value in values]


def attributes_in(text: str) -> dict[str, str]:
    """The attributes that `text` names, `{"shape": "circle", ...}`; the inverse of `prompt`."""
    words = text.lower().split()
    return {kind: word for kind, values in ATTRIBUTES.items() for word in values if word in words}


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random images: labels `[count, 3]` int64 (shape, colour, texture) and pixels `[count, 3, 32, 32]` in [0, 1]."""
    labels = torch.stack([torch.randint(len(v), (count,), generator=generator) for v in ATTRIBUTES.values()], dim=1)
    return labels, render(labels, generator)


def caption(label: Sequence[int], generator: torch.Generator) -> str:
    """A caption for one label (shape, colour, texture): words dropped at random, one in ten empty, in one of `TEMPLATES`."""
    draw = torch.rand(5, generator=generator)
    if draw[0] < 0.1:
        return ""
    keep = [True] * 3 if draw[1] < 0.4 else [bool(x < 0.5) for x in draw[2:]]
    named = {kind: values[i] for (kind, values), i, kept in zip(ATTRIBUTES.items(), label, keep, strict=True) if kept}
    chosen = torch.multinomial(torch.tensor(TEMPLATE_WEIGHTS, dtype=torch.float), 1, generator=generator)
    return prompt(named, TEMPLATES[int(chosen)])


def render(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw labels `[B, 3]` (shape, colour, texture) as pixels `[B, 3, 32, 32]` fp32 in [0, 1], anti-aliased.

    Position, size, rotation and ground differ from image to image.
    """
    count = len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1).uniform_(low, high, generator=generator)

    line = (torch.arange(SIZE * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE - SIZE / 2
    y, x = (line[None, :, None] - uniform(-3, 3)), (line[None, None, :] - uniform(-3, 3))
    radius, angle, ground = uniform(9.5, 12), uniform(-0.2, 0.2), uniform(0.7, 0.95)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    mask = _inside(u / radius, v / radius, labels[:, 0])
    ink = _RGB[labels[:, 1]][:, :, None, None] * (1 - (1 - _DARK) * _dark(u, v, labels[:, 2]))[:, None]
    image = torch.where(mask[:, None], ink, ground[:, None])
    return torch.nn.functional.avg_pool2d(image, _SUPERSAMPLE)


def _inside(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Return which points (u right, v down, about one radius) lie inside the shapes; `[B, H, W]` bool."""
    r, theta = torch.hypot(u, v), torch.atan2(u, -v)
    wedge = 2 * math.pi / 5
    fold = ((theta + wedge / 2) % wedge - wedge / 2).abs()
    # the star's edge runs from its tip (1.15 out, angle 0) to its notch (0.5 out, half a wedge on)
    tip, notch = 1.15, (0.5 * math.cos(wedge / 2), 0.5 * math.sin(wedge / 2))
    p, q = r * fold.cos(), r * fold.sin()
    bar = 0.36
    h, w = 0.15 - v * 1.15, u * 1.1
    inside = (
        r < 0.95,
        torch.maximum(u.abs(), v.abs()) < 0.82,
        (v < 0.75) & (v > 1.8 * u.abs() - 1.0),
        (p - tip) * notch[1] - q * (notch[0] - tip) < 0,
        torch.minimum(torch.maximum(u.abs() - bar, v.abs() - 1), torch.maximum(v.abs() - bar, u.abs() - 1)) < 0,
        (w**2 + h**2 - 0.75) ** 3 < w**2 * h**3 * 1.2,
    )
    return torch.stack(inside, dim=1)[torch.arange(len(shape)), shape]


def _dark(u: Tensor, v: Tensor, texture: Tensor) -> Tensor:
    """Return the dark parts of each texture, by pixels from the centre; `[B, H, W]` of 0 and 1."""
    pitch = 6.0
    striped = (u + v) * 0.7071 % pitch < pitch / 2.4
    dotted = torch.hypot(u % pitch - pitch / 2, v % pitch - pitch / 2) < 1.7
    checkered = (u % (1.4 * pitch) < 0.7 * pitch) ^ (v % (1.4 * pitch) < 0.7 * pitch)
    dark = torch.stack((torch.zeros_like(striped), striped, dotted, checkered), dim=1)
    return dark[torch.arange(len(texture)), texture].float()
