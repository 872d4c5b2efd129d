"""Draws the same images of a model before and after, and scores them: for `erase` and `evaluate` alike."""

from dataclasses import dataclass

from diffusers import DiffusionPipeline

from esd_peft.evaluation.image_cache import ImageStore
from esd_peft.evaluation.metrics import Findings, Metrics, score
from esd_peft.evaluation.rates import Accuracies, accuracies
from esd_peft.evaluation.suites import Roles, Suite
from esd_peft.models.sampling import EncodedPrompts, SampleIndex, check_images, drawn_by, image_bar, image_batches
from esd_peft.worlds.world import Prompt, Sampling


@dataclass
class Evaluator:
    """A suite's prompts, its number of images a prompt, and the metrics."""

    suite: Suite
    prompts: list[Prompt]
    roles: Roles
    metrics: Metrics
    seed: int
    batch_size: int

    @property
    def places(self) -> list[SampleIndex]:
        """All images, by the indices of their prompt and seed."""
        return [(i, k) for i in range(len(self.prompts)) for k in range(self.suite.seeds)]

    @property
    def negatives(self) -> list[str]:
        """The negative prompts that some images use."""
        return list(dict.fromkeys(p.sampling.negative_prompt for p in self.prompts if p.sampling.negative_prompt))

    def missing(self, store: ImageStore, rows: range | None = None) -> list[SampleIndex]:
        """Return the images of the prompts `rows` (None: all) that `store` lacks."""
        return store.missing([place for place in self.places if rows is None or place[0] in rows])

    def make(
        self, store: ImageStore, pipe: DiffusionPipeline, encoded: EncodedPrompts, label: str, rows: range | None = None
    ) -> None:
        """Draw the missing images with `pipe`; `encoded` are the prompts `rows`. Raises `UnusableImages` for NaN."""
        first, missing = rows.start if rows else 0, self.missing(store, rows)
        ways: dict[Sampling, list[SampleIndex]] = {}
        for place in missing:
            ways.setdefault(self.prompts[place[0]].sampling, []).append(place)
        with image_bar(len(missing), label) as bar:
            for way, places in ways.items():
                settings = {"negative": way.negative_prompt, "bar": bar, **self.suite.image_settings, **way.settings}
                with drawn_by(pipe, way.scheduler):
                    batches = image_batches(pipe, encoded, places, self.batch_size, self.seed, label, first, **settings)
                    for batch, images in batches:
                        for place, image in zip(batch, images, strict=True):
                            store.add(place, image)

    def check(self, store: ImageStore, label: str) -> None:
        """Raise `UnusableImages` if all images are blank, whichever run drew them."""
        check_images((store.read(place) for place in self.places), label)

    def score(self, before: ImageStore, after: ImageStore) -> Findings:
        """Score all images with all metrics."""
        return score(self.metrics, self.prompts, before, after, self.places, self.batch_size)

    def accuracies(self, findings: Findings) -> Accuracies | None:
        """Return the recognition rates; None without a detector."""
        if self.metrics.detector is None:
            return None
        seeds, count = self.suite.seeds, len(self.prompts)
        halves = ([seen[i * seeds : (i + 1) * seeds] for i in range(count)] for seen in findings.labels.values())
        return accuracies(self.prompts, self.roles, *halves)
