"""CLIP: images and texts as unit vectors, and the CLIP score."""

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel

from esd_peft.evaluation.pretrained import load_pretrained


class Clip:
    """A CLIP model by hub id or folder. Raises `UserError` naming `option` if it cannot be loaded."""

    def __init__(self, model: str, option: str = "--clip") -> None:
        self.name = model
        self.model = load_pretrained(CLIPModel, model, option, use_safetensors=True).eval()
        self.processor = load_pretrained(AutoProcessor, model, option)

    def to(self, device: torch.device) -> None:
        """Move it there."""
        self.model.to(device)

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> Tensor:
        """`[N, width]` fp32 on the CPU, of length 1."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """`[N, width]` fp32 on the CPU, of length 1; texts are cut to what CLIP reads."""
        inputs = self.processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(self.model.device)
        return _unit(self.model.get_text_features(**inputs))

    def scores(self, images: list[Image.Image], texts: list[str]) -> list[float]:
        """100 · max(cos(image, text), 0), pair by pair (Hessel et al. 2021, with torchmetrics' scale)."""
        cosine = (self.image_features(images) * self.text_features(texts)).sum(1)
        return (100 * cosine.clamp(min=0)).tolist()


def _unit(features: Tensor) -> Tensor:
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features.float().cpu(), dim=1)
