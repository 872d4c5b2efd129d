"""The work of a run in FLOPs, before it is run."""

from collections import Counter
from collections.abc import Iterator

import torch

from esd_peft.erasure.encoding import EncodedRun, encode_prompts
from esd_peft.erasure.flops import CallCosts, Work
from esd_peft.erasure.session import Session
from esd_peft.evaluation.timeline import STRENGTHS
from esd_peft.evaluation.validation import ValidationSampler
from esd_peft.models import ModelFamily, PromptEmbeds
from esd_peft.models.family import TOKENS
from esd_peft.models.text_encoding import WHOLE, TextEncoder, prompt_call
from esd_peft.options.erase import EraseConfig
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.plan import PromptPlan
from esd_peft.training.diagnosis import most_calls
from esd_peft.training.work import LOOKS, count_calls, sampled

WIDTH = 8  # of embeddings that nobody reads


class ImaginedEncoder(TextEncoder):
    """Counts the prompts that it is given, and answers at random: how many there are hardly depends on the answers."""

    def __init__(self, family: ModelFamily) -> None:
        self.family, self.device, self.dtype = family, torch.device("cpu"), torch.float32
        self.calls: Counter[str] = Counter()
        self._draws = torch.Generator().manual_seed(0)

    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Random embeddings of one token each."""
        return self._answer(prompts, WHOLE)

    def encode_short(self, prompts: list[str], length: int) -> Iterator[PromptEmbeds]:
        """Yield the same, all at once."""
        yield self._answer(prompts, length)

    def _answer(self, prompts: list[str], length: int) -> PromptEmbeds:
        self.calls[prompt_call(length)] += len(prompts)
        return {TOKENS: torch.randn(len(prompts), 1, WIDTH, generator=self._draws)}


def plan_work(config: EraseConfig, prompts: PromptPlan, family: ModelFamily) -> Work:
    """The work of a run with that resolved config; at most, as it takes less where few candidates look like synonyms."""
    encoder = ImaginedEncoder(family)
    run = encode_prompts(config, Session(family, prompts, {}), encoder)
    calls = count_calls(config.buffer, config.training, prompts)
    looked_at = config.validation.validation_prompt
    if looked_at:
        encoder.calls[prompt_call(WHOLE)] += len(looked_at) + 1
    calls.update({f"text encoders/{call}": count for call, count in encoder.calls.items()})
    calls.update(_checks(run, config.buffer, family))
    if looked_at:
        calls.update(_looks(len(looked_at) * config.validation.num_validation_images, family))
    return Work.of(calls, CallCosts(family, config.student, config.memory.gradient_checkpointing))


def _checks(run: EncodedRun, buffer: BufferOptions, family: ModelFamily) -> Counter[str]:
    """The diagnosis, and images before and after."""
    calls: Counter[str] = Counter()
    if run.probes is not None:
        scale = float(sampled(buffer, family).guidance_scale)
        calls.update({f"diagnosis/{call}": count for call, count in most_calls(run.probes, family, scale).items()})
    if run.validation is not None:
        evaluations, images = _evaluations(run.validation, family), len(run.validation.evaluator.places)
        calls["images/evaluation"] = calls["images/student evaluation"] = evaluations
        calls["images/decoded image"] = 2 * images
    return calls


def _evaluations(validation: ValidationSampler, family: ModelFamily) -> int:
    """Samples in the denoiser of all validation images, drawn once."""
    evaluator, total = validation.evaluator, 0
    for prompt in evaluator.prompts:
        settings = {**evaluator.suite.image_settings, **prompt.sampling.settings}
        steps, scale = settings.get("num_inference_steps"), settings.get("guidance_scale")
        total += evaluator.suite.seeds * _of_an_image(family, steps, scale)
    return total


def _of_an_image(family: ModelFamily, steps: int | None = None, scale: float | None = None) -> int:
    guided = family.takes_guidance and (family.guidance_scale if scale is None else scale) != 1
    return (steps or family.num_inference_steps) * (2 if guided else 1)


def _looks(images: int, family: ModelFamily) -> Counter[str]:
    """The images of --validation-prompt: of the base, as it trains, and at other strengths."""
    drawn, later = images * _of_an_image(family), LOOKS + len(STRENGTHS)
    return Counter({
        "images/evaluation": drawn,
        "images/student evaluation": later * drawn,
        "images/decoded image": (1 + later) * images,
    })  # fmt: skip
