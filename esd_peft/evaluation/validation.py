"""The validation images of erase: the same prompts and noise before and after, with a classifier if there is one."""

from dataclasses import InitVar, dataclass, field

from diffusers import ModelMixin
from PIL import Image

from esd_peft.errors import UserError
from esd_peft.evaluation.evaluator import Evaluator
from esd_peft.evaluation.image_cache import ImageMemory
from esd_peft.evaluation.metrics import Metrics
from esd_peft.evaluation.rates import Accuracies
from esd_peft.evaluation.suites import assign_roles, load_suite, suite_prompts
from esd_peft.models.sampling import before_after_grid, encode_with
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.worlds import World
from esd_peft.worlds.world import Prompt

SMALL_BATCH = 48  # images side by side on an embedded pipeline
FEW_STEPS = 10  # in which an embedded pipeline shows what it shows in 25 (docs/evaluation.md)
_GRID_PROMPTS = {  # by prompt group
    "training": 1,
    "paraphrases": 2,
    "synonyms": 2,
    "implicit": 1,
    "neighbours": 3,
    "unrelated": 2,
    "retain_set": 1,
}
UNRELATED = ("a dog on a beach", "a portrait of an old woman", "a red car in front of a house")


def check_concepts(world: World, concepts: list[str]) -> None:
    """Raise `UserError` for a concept that names no label of `world`: its erasure could not be measured."""
    for concept in concepts:
        if not world.attributes_in(concept):
            labels = ", ".join(word for values in world.attributes.values() for word in values)
            raise UserError(f"--concept {concept!r} names nothing the embedded pipeline draws; it draws {labels}")


@dataclass
class ValidationSampler:
    """Draws the same validation images of any denoiser. The constructor encodes the prompts with `encoder`.

    Embedded pipelines have prompt groups and a classifier; other models have the concepts and a few unrelated prompts.
    """

    encoder: InitVar[TextEncoder]
    concepts: list[str]
    seeds: int  # images of a prompt
    batch_size: int
    seed: int
    preserved: list[str] = field(default_factory=list)  # preservation prompts of the options
    num_inference_steps: int | None = None  # left out: the suite's, or the pipeline's own
    stores: dict[str, ImageMemory] = field(default_factory=dict)

    def __post_init__(self, encoder: TextEncoder) -> None:
        self.family, self.device, self.dtype = encoder.family, encoder.device, encoder.dtype
        world = self.family.world
        suite = load_suite(world.name if world else "concept").model_copy(update={"seeds": self.seeds})
        if self.num_inference_steps is not None:
            suite = suite.model_copy(update={"num_inference_steps": self.num_inference_steps})
        plain = [Prompt(text) for text in (*self.concepts, *UNRELATED)]
        prompts = suite_prompts(suite, self.concepts, None, self.preserved) if world else plain
        roles = assign_roles(suite, prompts, self.concepts)
        metrics = Metrics.of_suite(suite, prompts)
        self.evaluator = Evaluator(suite, prompts, roles, metrics, self.seed, SMALL_BATCH if world else self.batch_size)
        texts = [prompt.text for prompt in prompts]
        self.encoded = encode_with(encoder, texts, self.evaluator.negatives)

    def make(self, denoiser: ModelMixin, label: str) -> None:
        """Draw the images of `denoiser` and store them as `label`. Raises `UnusableImages` if they show nothing."""
        store = self.stores[label] = ImageMemory()
        self.evaluator.make(store, self.family.pipeline(denoiser, self.device, self.dtype), self.encoded, label)
        self.evaluator.check(store, label)

    def accuracies(self) -> Accuracies | None:
        """Return recognition rates before and after; None without a detector."""
        return self.evaluator.accuracies(self.evaluator.score(self.stores["before"], self.stores["after"]))

    def grid(self) -> Image.Image:
        """Return a grid of a few prompts, before above after."""
        rows, seeds = self.grid_prompts(), range(min(2, self.seeds))
        before, after = ([[self.stores[half].read((i, k)) for k in seeds] for i in rows] for half in ("before", "after"))
        return before_after_grid([self.evaluator.prompts[i].text for i in rows], before, after)

    def grid_prompts(self) -> list[int]:
        """Return the indices of the grid's prompts: the first few of each prompt group."""
        prompts = self.evaluator.prompts
        if self.family.world is None:
            return list(range(len(prompts)))
        rows: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows.setdefault(prompt.group, []).append(i)
        return [i for key, count in _GRID_PROMPTS.items() for i in rows.get(key, [])[:count]]
