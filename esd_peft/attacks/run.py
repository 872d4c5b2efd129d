"""Attacks of an evaluation, run on the erased model and compared with the base."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch

from esd_peft.attacks.attack import Attack, AttackTarget
from esd_peft.attacks.fine_tuning import FineTuning
from esd_peft.attacks.prefix import Prefix
from esd_peft.attacks.prompts import Prompts
from esd_peft.attacks.textual_inversion import TextualInversion
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.errors import UserError
from esd_peft.evaluation.comparison import Comparison, Model
from esd_peft.evaluation.detectors import Detector
from esd_peft.evaluation.image_cache import ImageCache
from esd_peft.evaluation.rates import Change, Rate, rate
from esd_peft.evaluation.result import AttackResult
from esd_peft.evaluation.suites import Roles, Suite
from esd_peft.io.images import checked_images
from esd_peft.io.pixels import read_images, to_pixels
from esd_peft.models import PromptEmbeds
from esd_peft.models.sampling import EncodedPrompts, SampleIndex, check_images, image_batches, to_image
from esd_peft.options.evaluate import EvaluateConfig
from esd_peft.prompts.plan import spread
from esd_peft.runtime.seeds import generator
from esd_peft.worlds.world import Prompt


def make_attacks(config: EvaluateConfig, suite: Suite) -> list[Attack]:
    """Create the attacks of the config.

    Raises `UserError` for a list of prompts that cannot be read, or a suite that cannot detect success.
    """
    if config.attack and (suite.detector is None or suite.role != "named"):
        raise UserError(
            "--attack needs a --suite whose prompts name the concept and whose detector sees it; use another one"
        )
    if config.attack_reference is not None:
        checked_images(config.attack_reference, "--attack-reference")
    steps = {} if config.attack_steps is None else {"steps": config.attack_steps}
    makers: dict[str, Callable[[], Attack]] = {
        "textual-inversion": lambda: TextualInversion(**steps),
        "prefix": lambda: Prefix(tokens=config.prefix_tokens, **steps),
        "prompts": lambda: Prompts(config.attack_prompts),
        "fine-tuning": lambda: FineTuning(**steps),
    }
    return [makers[name]() for name in dict.fromkeys(config.attack)]


@dataclass
class AttackRunner:
    """Runs the attacks of one evaluation."""

    config: EvaluateConfig
    models: Comparison
    detector: Detector | None
    prompts: list[Prompt]
    roles: Roles
    before: ImageCache
    suite: Suite
    device: torch.device
    dtype: torch.dtype

    def run(self, attacks: list[Attack]) -> list[AttackResult]:
        """Run every attack on every concept; each starts from the original erased model."""
        results: list[AttackResult] = []
        for concept, rows in self.roles.concept_prompts.items() if attacks else ():
            named = [i for i in rows if concept in self.prompts[i].text]
            if not named:
                raise UserError(f"--attack: no prompt of this --suite names {concept!r} as one piece; use another --suite")
            places = [(i, k) for i in named for k in range(self.suite.seeds)]
            target = self._target(concept, places)
            attacked = spread(places, self.config.attack_images)
            results += [self._attack(attack, target, attacked) for attack in attacks]
        return results

    def _target(self, concept: str, places: list[SampleIndex]) -> AttackTarget:
        """Return the target, with images from the config's folder or of the base."""
        family, folder = self.models.erased.family, self.config.attack_reference
        if folder is not None:
            images = read_images(folder, family.image_size(family.empty_denoiser()), "--attack-reference")
            examples = [*itertools.islice(itertools.cycle(places), len(images))]
        else:
            examples = spread(places, self.config.attack_examples)
            images = torch.stack([to_pixels(self.before.read(place)) for place in examples])
        draws = generator(self.config.seed, f"attack/pictures/{concept}")
        latents = family.encode_images(images, draws, self.device)
        return AttackTarget(concept, [self.prompts[i].text for i, _ in examples], latents, self.config.seed)

    def _attack(self, attack: Attack, target: AttackTarget, places: list[SampleIndex]) -> AttackResult:
        if own := attack.own_prompts(target.concept):
            texts = dict(enumerate(own))
            places = [(i, k) for i in texts for k in range(max(1, len(places) // len(texts)))]
            base = self._victim(self.models.base)
            on_base = self._rate(base, target.concept, base.encode_frozen([*texts.values()]), places)
            del base
        else:
            texts = {i: self.prompts[i].text for i, _ in places}
            on_base = self._judge(target.concept, [self.before.read(place) for place in places])
        victim, curve = self._victim(self.models.erased), []
        for budget, embeds in attack.attempts(victim, target, [*texts.values()]):
            curve.append((budget, Change(on_base, self._rate(victim, target.concept, embeds, places))))
        return AttackResult(attack.name, target.concept, attack.unit, curve, attack.about, victim.nfe)

    def _victim(self, model: Model) -> Victim:
        denoiser = model.denoiser(self.device, self.dtype)
        if isinstance(denoiser, peft.PeftModel):  # published models are merged
            denoiser = denoiser.merge_and_unload()
        encoders = load_encoders(model.family, self.device, self.dtype)
        return Victim(model.family, denoiser.requires_grad_(False), encoders, self.device, self.dtype)

    def _rate(self, victim: Victim, concept: str, embeds: PromptEmbeds, places: list[SampleIndex]) -> Rate:
        """Return the recognition rate; `embeds` are those of the prompts of `places`, in order. Raises `UnusableImages` for
        bad images.
        """
        null = victim.encode_frozen([""])
        encoded = {name: torch.cat([value, null[name]]).detach().cpu() for name, value in embeds.items()}
        numbers = {i: row for row, i in enumerate(dict.fromkeys(i for i, _ in places))}
        prompts = EncodedPrompts(victim.family, encoded, self.device, numbers)
        pipe = victim.family.pipeline(victim.denoiser, self.device, self.dtype)
        size, seed = self.config.batch_size, self.config.seed
        batches = image_batches(pipe, prompts, places, size, seed, "attacked", **self.suite.image_settings)
        drawn = [to_image(image) for _, images in batches for image in images]
        check_images(drawn, "attacked")
        return self._judge(concept, drawn)

    def _judge(self, concept: str, images: list[Any]) -> Rate:
        assert self.detector is not None  # `make_attacks` sees to that
        size, labels = self.config.batch_size, self.roles.labels[concept]
        detected = [s for start in range(0, len(images), size) for s in self.detector.detect(images[start : start + size])]
        return rate(labels, detected)
