"""The pictures of a model before and after, and what is read off them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from esd_peft.backbones import Backbone
from esd_peft.config import EraseConfig
from esd_peft.devices import autocast
from esd_peft.evaluation import recognition
from esd_peft.evaluation.pictures import EncodedPrompts, before_after_grid, make_pictures
from esd_peft.shapes.classifier import load_classifier

Rates = dict[str, dict[str, float]]  # name: before, after: share of pictures
SMALL_BATCH = 48  # pictures side by side on the embedded pipeline
UNRELATED = ("a dog on a beach", "a portrait of an old woman", "a red car in front of a house")


@dataclass
class Gallery:
    """Takes the same pictures of a denoiser each time it is asked. Prompts are encoded when it is made.

    On the embedded pipeline they are of every prompt of the shapes world and are classified; otherwise
    they are of the concepts and a few unrelated prompts.
    """

    backbone: Backbone
    config: EraseConfig
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.judged, self.concepts = self.config.model is None, self.config.concept_names
        self.prompts = recognition.judged_prompts(self.concepts) if self.judged else [*self.concepts, *UNRELATED]
        if self.config.eval_seeds:
            self.encoded = EncodedPrompts(self.backbone, self.prompts, self.device, self.dtype)

    def take(self, denoiser: ModelMixin, label: str) -> Tensor:
        """`[prompts, seeds, 3, H, W]` fp32 in [0, 1]."""
        config = self.config
        pipe = self.backbone.pipeline(denoiser, self.device, self.dtype)
        with autocast(config, self.device, self.dtype):
            batch_size = SMALL_BATCH if self.judged else config.rollout_batch_size
            return make_pictures(pipe, self.encoded, config.eval_seeds, batch_size, config.seed, label)

    def rates(self, before: Tensor, after: Tensor) -> tuple[Rates, Rates]:
        """`{name: {"before": rate, "after": rate}}` of the concepts and of everything else; empty if not judged."""
        if not self.judged:
            return {}, {}
        judge = load_classifier()
        halves = [recognition.recognition(judge, self.prompts, half, self.concepts) for half in (before, after)]
        concepts, others = (
            {name: {"before": was, "after": after_rates[name]} for name, was in before_rates.items()}
            for before_rates, after_rates in zip(*halves, strict=True)
        )
        return concepts, others

    def grid(self, before: Tensor, after: Tensor) -> Image.Image:
        """A sheet of a few prompts, before above after."""
        shown: Sequence[int] = range(len(self.prompts))
        if self.judged:
            shown = recognition.shown_prompts(self.concepts, self.prompts)
        rows = torch.tensor(shown)
        return before_after_grid([self.prompts[i] for i in shown], before[rows][:, :2], after[rows][:, :2])
