"""Accuracy of an embedded pipeline and its classifier.

    python benchmarks/world_quality.py emoji [--seeds 1] [--image sheet.png]

The classifier on images that the renderer makes from an unused seed, and the pipeline's images of every full prompt.
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from esd_peft.models import ModelFamily, open_family
from esd_peft.models.sampling import encode_prompts, make_images
from esd_peft.worlds import WORLDS, World
from esd_peft.worlds.world import Labels

HELD_OUT = 4096


def report(who: str, names: list[Labels], prompted: list[Labels]) -> None:
    """Return the accuracy of each domain, and the labels with the lowest."""
    for domain in dict.fromkeys(domain for labels in prompted for domain in labels):
        rows = [(name.get(domain), labels[domain]) for name, labels in zip(names, prompted, strict=True) if domain in labels]
        right = sum(seen == label for seen, label in rows)
        print(f"{who}, {domain}: {right / len(rows):.2%} of {len(rows)}")
        wrong = Counter(f"{label} as {seen}" for seen, label in rows if seen != label)
        print("   " + ", ".join(f"{what} ({count})" for what, count in wrong.most_common(8)))


def as_prompted(family: ModelFamily, world: World, seeds: int) -> tuple[Tensor, list[Labels], list[Labels]]:
    """Draw images `[prompts, seeds, 3, H, W]` of the full prompts; return these with their detected and prompted labels."""
    cpu, prompts = torch.device("cpu"), world.full_prompts()
    pipe = family.pipeline(family.load_denoiser(torch.float32), cpu, torch.float32)
    encoded = encode_prompts(family, [prompt.text for prompt in prompts], cpu, torch.float32)
    images, classifier = make_images(pipe, encoded, seeds, batch_size=48), world.load_classifier()
    names = [name for part in images.flatten(0, 1).split(256) for name in classifier.classify(part)]
    return images, names, [prompt.labels for prompt in prompts for _ in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=WORLDS)
    parser.add_argument("--seeds", type=int, default=1, help="images a prompt")
    parser.add_argument("--image", type=Path, help="write a sheet with the first images")
    args = parser.parse_args()
    world = WORLDS[args.world]
    classifier = world.load_classifier()

    prompted, pixels = world.rendered(HELD_OUT, torch.Generator().manual_seed(2**40))
    names = [name for part in pixels.split(256) for name in classifier.classify(part)]
    report("classifier, held-out rendered images", names, prompted)

    images, names, prompted = as_prompted(open_family(args.world), world, args.seeds)
    report("pipeline, images as prompted", names, prompted)
    if args.image:
        side = int(len(images) ** 0.5)
        sheet = images[: side * side, 0].unflatten(0, (side, side)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        Image.fromarray((sheet * 255).byte().numpy()).save(args.image)


if __name__ == "__main__":
    main()
