"""Every random draw comes from the config's seed, through a generator with a name of its own."""

import hashlib

import torch


def seed_for(seed: int, name: str) -> int:
    """A 63-bit seed for the stream `name`; streams do not move when another one draws more."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """The CPU generator of the stream `name`: the same draws whatever device they are used on."""
    return torch.Generator().manual_seed(seed_for(seed, name))
