"""The pictures that the erase command takes before and after, and what is read off them."""

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.evaluation.rates import Shares, accuracies
from esd_peft.evaluation.suites import Prompt, assign_roles, load_suite, world_prompts
from esd_peft.models import Backbone
from esd_peft.models.sampling import before_after_grid, encode_prompts, make_pictures
from esd_peft.runtime.devices import autocast
from esd_peft.worlds.shapes import world
from esd_peft.worlds.shapes.classifier import load_classifier

SMALL_BATCH = 48  # pictures side by side on the embedded pipeline
UNRELATED = ("a dog on a beach", "a portrait of an old woman", "a red car in front of a house")


def check_concepts(concepts: list[str]) -> None:
    """Raise `UserError` for a concept that names no shape, colour or texture: its erasure could not be seen."""
    for concept in concepts:
        if not world.attributes_in(concept):
            known = ", ".join(word for values in world.ATTRIBUTES.values() for word in values)
            raise UserError(f"--concept {concept!r} names nothing the embedded pipeline draws; it draws {known}")


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
        plain = [Prompt(text) for text in (*self.concepts, *UNRELATED)]
        self.prompts = world_prompts(self.concepts) if self.judged else plain
        self.roles = assign_roles(load_suite("shapes" if self.judged else "concept"), self.prompts, self.concepts)
        if self.config.looks:
            texts = [prompt.text for prompt in self.prompts]
            self.encoded = encode_prompts(self.backbone, texts, self.device, self.dtype)

    def take(self, denoiser: ModelMixin, label: str) -> Tensor:
        """`[prompts, seeds, 3, H, W]` fp32 in [0, 1]."""
        config = self.config
        pipe = self.backbone.pipeline(denoiser, self.device, self.dtype)
        with autocast(config, self.device, self.dtype):
            batch_size = SMALL_BATCH if self.judged else config.rollout_batch_size
            return make_pictures(pipe, self.encoded, config.eval_seeds, batch_size, config.seed, label)

    def rates(self, before: Tensor, after: Tensor) -> tuple[Shares, Shares]:
        """`{name: {"before": rate, "after": rate}}` of the concepts and of everything else; empty if not judged."""
        if not self.judged:
            return {}, {}
        judge = load_classifier()
        found = accuracies(self.prompts, self.roles, *([judge.name(row) for row in half] for half in (before, after)))
        return found.shares

    def grid(self, before: Tensor, after: Tensor) -> Image.Image:
        """A sheet of a few prompts, before above after."""
        shown = self.shown()
        rows = torch.tensor(shown)
        return before_after_grid([self.prompts[i].text for i in shown], before[rows][:, :2], after[rows][:, :2])

    def shown(self) -> list[int]:
        """Which prompts go into the grid: each concept alone, in a few full prompts, and a few that do not name it."""
        if not self.judged:
            return list(range(len(self.prompts)))
        texts, free = [prompt.text for prompt in self.prompts], self.roles.kept
        named = [i for i in range(len(texts)) if i not in free]
        alone = [texts.index(world.prompt(world.attributes_in(concept), "a {}")) for concept in self.concepts]
        step = 29  # prime to the 144 full prompts: consecutive picks differ in shape, colour and texture
        few = [named[(7 + k * step) % len(named)] for k in range(3)]
        few += [free[(k * step) % len(free)] for k in range(6 if free else 0)]
        return list(dict.fromkeys(alone + few))
