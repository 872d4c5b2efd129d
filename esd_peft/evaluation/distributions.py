"""FID and KID: how far the images as a set lie from reference images, in the features of a network."""

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from esd_peft.evaluation.pretrained import describe_version, load_pretrained


class Features:
    """Pooled features of a transformers vision model. Published FIDs use Inception v3: compare only with your own."""

    def __init__(self, model: str) -> None:
        self.name = model
        self.model = load_pretrained(AutoModel, model, "--features", use_safetensors=True).eval()
        self.processor = load_pretrained(AutoImageProcessor, model, "--features")
        self.version = describe_version(self.model)

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.model.to(device)

    @torch.no_grad()
    def of(self, images: list[Image.Image]) -> Tensor:
        """`[N, width]` fp64 on the CPU."""
        inputs = self.processor(images, return_tensors="pt").to(self.model.device)
        whole = getattr(self.model, "get_image_features", self.model)  # CLIP has two towers
        output = whole(**inputs)
        pooled = getattr(output, "pooler_output", output)
        return pooled.flatten(1).double().cpu()


def fid(a: Tensor, b: Tensor) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of two sets of features `[N, width]` (Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which are real and not negative.
    Biased upwards for few images: compare figures of equal numbers only.
    """
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def kid(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x·y / width + 1)³ (Bińkowski et al. 2018); may fall below 0 by chance."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()
