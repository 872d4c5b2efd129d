"""How well the embedded pipeline and its classifier do what they promise.

    python benchmarks/shapes_quality.py [--seeds 3] [--image sheet.png]

The classifier on images the renderer makes from an unused seed, and the pipeline's images of every full prompt.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from esd_peft.models import open_family
from esd_peft.models.sampling import encode_prompts, make_images
from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import load_classifier

HELD_OUT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="images a prompt")
    parser.add_argument("--image", type=Path, help="write a sheet with the first image of every prompt")
    args = parser.parse_args()
    classifier = load_classifier()

    labels, pixels = world.sample(HELD_OUT, torch.Generator().manual_seed(2**40))
    names = classifier.name(pixels)
    for i, (kind, values) in enumerate(world.ATTRIBUTES.items()):
        right = sum(name[kind] == values[int(label[i])] for name, label in zip(names, labels, strict=True))
        print(f"classifier, {kind} of {HELD_OUT} held-out rendered images: {right / HELD_OUT:.2%}")

    cpu, family = torch.device("cpu"), open_family(None)
    pipe = family.pipeline(family.load_denoiser(torch.float32), cpu, torch.float32)
    prompts = world.full_prompts()
    images = make_images(pipe, encode_prompts(family, prompts, cpu, torch.float32), args.seeds, batch_size=36)
    names = classifier.name(images.flatten(0, 1))
    for kind in world.ATTRIBUTES:
        wanted = [world.attributes_in(p)[kind] for p in prompts for _ in range(args.seeds)]
        right = sum(name[kind] == want for name, want in zip(names, wanted, strict=True))
        print(f"pipeline, {kind} of {len(wanted)} images as prompted: {right / len(wanted):.2%}")
    if args.image:
        sheet = images[:, 0].unflatten(0, (12, 12)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        Image.fromarray((sheet * 255).byte().numpy()).save(args.image)


if __name__ == "__main__":
    main()
