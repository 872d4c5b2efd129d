"""Attacks of an evaluation: what the base draws is to be brought back on the erased model, and is judged as the rest is."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch

from esd_peft.attacks.attack import Attack, Goal
from esd_peft.attacks.fine_tuning import FineTuning
from esd_peft.attacks.prefix import Prefix
from esd_peft.attacks.prompts import Prompts
from esd_peft.attacks.textual_inversion import TextualInversion
from esd_peft.attacks.victim import Victim, load_encoders
from esd_peft.errors import UserError
from esd_peft.evaluation import result
from esd_peft.evaluation.comparison import Comparison, Model
from esd_peft.evaluation.detectors import Detector
from esd_peft.evaluation.image_cache import ImageCache
from esd_peft.evaluation.rates import Change, Rate, rate
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
    """Those that the config names.

    Raises `UserError` for a list of prompts that cannot be read, or where nobody could say whether an attack succeeds.
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
    """What all attacks of one evaluation share."""

    config: EvaluateConfig
    models: Comparison
    detector: Detector | None
    prompts: list[Prompt]
    roles: Roles
    before: ImageCache
    suite: Suite
    device: torch.device
    dtype: torch.dtype

    def run(self, attacks: list[Attack]) -> list[result.Attack]:
        """Every attack on every concept; each meets the erased model as it was."""
        made: list[result.Attack] = []
        for concept, rows in self.roles.concept_prompts.items() if attacks else ():
            named = [i for i in rows if concept in self.prompts[i].text]
            if not named:
                raise UserError(f"--attack: no prompt of this --suite names {concept!r} as one piece; use another --suite")
            places = [(i, k) for i in named for k in range(self.suite.seeds)]
            goal = self._goal(concept, places)
            shown = spread(places, self.config.attack_images)
            made += [self._attack(attack, goal, shown) for attack in attacks]
        return made

    def _goal(self, concept: str, places: list[SampleIndex]) -> Goal:
        """With images from the config's folder, or those that the base has made."""
        family, folder = self.models.erased.family, self.config.attack_reference
        if folder is not None:
            images = read_images(folder, family.image_size(family.empty_denoiser()), "--attack-reference")
            shown = [*itertools.islice(itertools.cycle(places), len(images))]
        else:
            shown = spread(places, self.config.attack_examples)
            images = torch.stack([to_pixels(self.before.read(place)) for place in shown])
        draws = generator(self.config.seed, f"attack/pictures/{concept}")
        latents = family.encode_images(images, draws, self.device)
        return Goal(concept, [self.prompts[i].text for i, _ in shown], latents, self.config.seed)

    def _attack(self, attack: Attack, goal: Goal, places: list[SampleIndex]) -> result.Attack:
        if own := attack.own_prompts(goal.concept):
            texts = dict(enumerate(own))
            places = [(i, k) for i in texts for k in range(max(1, len(places) // len(texts)))]
            base = self._victim(self.models.base)
            on_base = self._rate(base, goal.concept, base.encode_frozen([*texts.values()]), places)
            del base
        else:
            texts = {i: self.prompts[i].text for i, _ in places}
            on_base = self._judge(goal.concept, [self.before.read(place) for place in places])
        victim, curve = self._victim(self.models.erased), []
        for budget, embeds in attack.attempts(victim, goal, [*texts.values()]):
            curve.append((budget, Change(on_base, self._rate(victim, goal.concept, embeds, places))))
        return result.Attack(attack.name, goal.concept, attack.unit, curve, attack.about, victim.nfe)

    def _victim(self, model: Model) -> Victim:
        denoiser = model.denoiser(self.device, self.dtype)
        if isinstance(denoiser, peft.PeftModel):  # what is published is merged
            denoiser = denoiser.merge_and_unload()
        encoders = load_encoders(model.family, self.device, self.dtype)
        return Victim(model.family, denoiser.requires_grad_(False), encoders, self.device, self.dtype)

    def _rate(self, victim: Victim, concept: str, embeds: PromptEmbeds, places: list[SampleIndex]) -> Rate:
        """`embeds` are those of the places' prompts, in order. Raises `UnusableImages` if the images show nothing."""
        null = victim.encode_frozen([""])
        encoded = {name: torch.cat([value, null[name]]).detach().cpu() for name, value in embeds.items()}
        numbers = {i: row for row, i in enumerate(dict.fromkeys(i for i, _ in places))}
        prompts = EncodedPrompts(victim.family, encoded, self.device, numbers)
        pipe = victim.family.pipeline(victim.denoiser, self.device, self.dtype)
        size, seed = self.config.batch_size, self.config.seed
        made = image_batches(pipe, prompts, places, size, seed, "attacked", **self.suite.image_settings)
        shown = [to_image(image) for _, images in made for image in images]
        check_images(shown, "attacked")
        return self._judge(concept, shown)

    def _judge(self, concept: str, images: list[Any]) -> Rate:
        assert self.detector is not None  # `make_attacks` sees to that
        size, wanted = self.config.batch_size, self.roles.labels[concept]
        seen = [s for start in range(0, len(images), size) for s in self.detector.see(images[start : start + size])]
        return rate(wanted, seen)
