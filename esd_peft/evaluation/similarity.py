"""Distances between images of the same prompt and noise, before and after."""

from importlib.metadata import version

import torch
from PIL import Image

from esd_peft.errors import UserError
from esd_peft.io.pixels import to_pixels

LPIPS_SIZE = 64  # pixels, as in UCE's protocol


def pixel_distances(before: list[Image.Image], after: list[Image.Image]) -> list[float]:
    """Root mean square difference of the pixels, in [0, 1], pair by pair. It measures any difference, not its kind."""
    pairs = zip(map(to_pixels, before), map(to_pixels, after), strict=True)
    return [(a - b).square().mean().sqrt().item() for a, b in pairs]


class Lpips:
    """LPIPS with AlexNet (Zhang et al. 2018), on images of 64² pixels.

    Its package needs torchvision, which downloads AlexNet: both stay out of this package's dependencies. Raises
    `UserError` if they are not there.
    """

    def __init__(self) -> None:
        try:
            import lpips

            self.model = lpips.LPIPS(net="alex", verbose=False)
        except ImportError:
            raise UserError("--lpips needs the packages lpips and torchvision: pip install lpips") from None
        except OSError as error:
            raise UserError(f"--lpips cannot load AlexNet ({error}); run it once while online, or leave it out") from None
        self.device, self.version = torch.device("cpu"), version("lpips")

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.device = device
        self.model.to(device)

    @torch.no_grad()
    def distances(self, before: list[Image.Image], after: list[Image.Image]) -> list[float]:
        """0 for equal images, pair by pair."""
        halves = (torch.stack([to_pixels(p.resize((LPIPS_SIZE,) * 2)) for p in half]) for half in (before, after))
        a, b = (half.to(self.device) * 2 - 1 for half in halves)
        return self.model(a, b).flatten().tolist()
