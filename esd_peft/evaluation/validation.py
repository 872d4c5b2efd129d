"""The images that the erase command makes before and after, and what they show."""

from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from PIL import Image

from esd_peft.errors import UserError
from esd_peft.evaluation.evaluator import Evaluator
from esd_peft.evaluation.image_cache import ImageMemory
from esd_peft.evaluation.metrics import Metrics
from esd_peft.evaluation.rates import Shares
from esd_peft.evaluation.suites import Prompt, assign_roles, load_suite, world_prompts
from esd_peft.models import ModelFamily
from esd_peft.models.sampling import before_after_grid, encode_prompts
from esd_peft.worlds import World

SMALL_BATCH = 48  # images side by side on an embedded pipeline
UNRELATED = ("a dog on a beach", "a portrait of an old woman", "a red car in front of a house")


def check_concepts(world: World, concepts: list[str]) -> None:
    """Raise `UserError` for a concept that names nothing of the world: its erasure could not be seen."""
    for concept in concepts:
        if not world.attributes_in(concept):
            known = ", ".join(word for values in world.attributes.values() for word in values)
            raise UserError(f"--concept {concept!r} names nothing the embedded pipeline draws; it draws {known}")


@dataclass
class ValidationSampler:
    """Makes the same images of a denoiser each time. Prompts are encoded when it is made.

    On an embedded pipeline they are of every prompt of its world, and its classifier looks at them; otherwise they are of
    the concepts and a few unrelated prompts.
    """

    family: ModelFamily
    concepts: list[str]
    seeds: int  # images of a prompt
    batch_size: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    stores: dict[str, ImageMemory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = self.family.world
        suite = load_suite(world.name if world else "concept").model_copy(update={"seeds": self.seeds})
        plain = [Prompt(text) for text in (*self.concepts, *UNRELATED)]
        prompts = world_prompts(world, self.concepts) if world else plain
        roles = assign_roles(suite, prompts, self.concepts)
        metrics = Metrics.of_suite(suite, prompts)
        self.evaluator = Evaluator(suite, prompts, roles, metrics, self.seed, SMALL_BATCH if world else self.batch_size)
        self.encoded = encode_prompts(self.family, [prompt.text for prompt in prompts], self.device, self.dtype)

    def make(self, denoiser: ModelMixin, label: str) -> None:
        """The images `label`, of `denoiser` as it is."""
        store = self.stores[label] = ImageMemory()
        self.evaluator.make(store, self.family.pipeline(denoiser, self.device, self.dtype), self.encoded, label)

    def shares(self) -> tuple[Shares, Shares]:
        """`{name: {"before": rate, "after": rate}}` of the concepts and of everything else; empty if nobody can tell."""
        found = self.evaluator.look(self.stores["before"], self.stores["after"])
        accuracies = self.evaluator.accuracies(found)
        return accuracies.shares if accuracies else ({}, {})

    def grid(self) -> Image.Image:
        """A sheet of a few prompts, before above after."""
        rows, seeds = self.shown(), range(min(2, self.seeds))
        before, after = ([[self.stores[half].read((i, k)) for k in seeds] for i in rows] for half in ("before", "after"))
        return before_after_grid([self.evaluator.prompts[i].text for i in rows], before, after)

    def shown(self) -> list[int]:
        """Which prompts go into the grid: each concept alone, in a few full prompts, and a few that do not name it."""
        world, prompts = self.family.world, self.evaluator.prompts
        if world is None:
            return list(range(len(prompts)))
        texts, free = [prompt.text for prompt in prompts], self.evaluator.roles.kept
        named = [i for i in range(len(texts)) if i not in free]
        alone = [texts.index(world.prompt(world.attributes_in(concept))) for concept in self.concepts]
        step = 29  # prime to the 144 full prompts: consecutive picks differ in shape, colour and texture
        few = [named[(7 + k * step) % len(named)] for k in range(3)]
        few += [free[(k * step) % len(free)] for k in range(6 if free else 0)]
        return list(dict.fromkeys(alone + few))
