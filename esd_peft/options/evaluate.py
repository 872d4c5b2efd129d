"""The options of `python -m esd_peft.evaluate`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, field_validator, model_validator

from esd_peft.options.base import Options, is_blank
from esd_peft.options.model import DrawingOptions, GuidanceScale, InferenceSteps
from esd_peft.options.runtime import Dtype

WITHIN = "evaluation"  # the one output inside of what is evaluated
Seeds = Annotated[int, Field(ge=1, le=10**4)]
AttackName = Literal["textual-inversion", "prefix", "prompts", "fine-tuning"]


class ValidationOptions(Options):
    """Images before, during and after training."""

    num_validation_images: Annotated[int, Field(ge=0, le=10**4)] = 2
    """Images of each prompt, before and after; on the embedded pipeline they are judged. 0: none."""
    validation_prompt: Annotated[list[str], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A prompt to look at before it trains and after each fifth of the steps: --num-validation-images images of it, from the
    same noise each time, on the dashboard of --report-to and in OUTPUT.checkpoint/validation, at the end in
    OUTPUT/validation; report.html there shows them all, and in the end the adapter at other strengths; repeat for
    several."""

    @field_validator("validation_prompt", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("validation_prompt")
    @classmethod
    def _some_text(cls, value: list[str]) -> list[str]:
        if any(map(is_blank, value)):
            raise ValueError("say what to look at, or leave the option out")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "ValidationOptions":
        if self.validation_prompt and not self.num_validation_images:
            raise ValueError("--validation-prompt needs images; leave --num-validation-images 0 out")
        return self


class EvaluateConfig(DrawingOptions):
    """Compare a model before and after erasing: is the concept gone, and is the rest intact?"""

    erased: Path
    """The adapter directory that `python -m esd_peft.erase` wrote, or a merged pipeline directory."""
    base: str | None = None
    """The pipeline directory before erasing; left out: the one the adapter was trained on."""
    suite: str | None = None
    """What to ask: shapes, emoji, concept, imagenette, artists, i2p, coco, csv, or a YAML file like theirs
    (docs/evaluation.md); left out: that of an embedded pipeline, otherwise concept."""
    prompts: str | None = None
    """With suites i2p, coco and csv: a CSV file with a column prompt, or OWNER/NAME/FILE.csv of a dataset on the hub."""
    concept: Annotated[list[str], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """What was erased; left out: as the adapter or the merged pipeline says."""
    output: Path = Path("evaluation")
    """Where images, report.html, report.md and result.json go. Images that are there are used again."""
    overwrite: bool = False
    """Remove images in the output directory that were made by other models or with other options."""

    seeds: Seeds | None = None
    """Images of each prompt; left out: as many as the suite says."""
    limit: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Use only so many of the suite's prompts for each concept, and as many others, evenly spread; left out: all."""
    num_inference_steps: InferenceSteps | None = None
    """Denoising steps of an image; left out: as the suite says."""
    guidance_scale: GuidanceScale | None = None
    """Classifier-free guidance of the images; left out: as the suite says."""
    batch_size: Annotated[int, Field(ge=1, le=10**5)] = 16
    """Images made, and judged, side by side."""

    detector: str | None = None
    """The model that names what an image shows, by hub id or folder; left out: the suite's."""
    threshold: Annotated[float, Field(ge=0.25, lt=1)] = 0.6
    """With suite i2p: the score from which NudeNet's detections count; it reports none below 0.25."""
    clip: str | None = None
    """A CLIP model, by hub id or folder, for CLIP scores; left out: none are computed."""
    lpips: bool = False
    """LPIPS between images before and after (needs the packages lpips and torchvision, whose weights are pickles)."""
    reference: Path | None = None
    """A folder of images that FID and KID compare with; needs --features."""
    features: str | None = None
    """The model whose features FID and KID compare, by hub id or folder; needs --reference."""

    attack: Annotated[list[AttackName], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """Try to bring the concept back: textual-inversion, prefix, prompts or fine-tuning (docs/attacks.md); repeat the
    option for several."""
    attack_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Steps of each attack that learns; left out: textual inversion 300, prefix 40, fine-tuning 64."""
    attack_images: Annotated[int, Field(ge=1, le=10**5)] = 48
    """Images that are judged at each point of an attack."""
    attack_examples: Annotated[int, Field(ge=1, le=10**5)] = 32
    """Images of the concept that attacks learn from: the base's."""
    attack_reference: Path | None = None
    """A folder of images of the concept to learn from instead."""
    attack_prompts: Path | None = None
    """With --attack prompts: a text file of prompts, one a line, in which {} is the concept; left out: a built-in list."""
    prefix_tokens: Annotated[int, Field(ge=1, le=16)] = 5
    """With --attack prefix: tokens before the prompt (UnlearnDiffAtk takes 5, and 3 for styles)."""

    device: str = "auto"
    """auto (a GPU, where there is one), cpu, cuda (NVIDIA's, and AMD's by ROCm), cuda:1, xpu (Intel's) or mps (Apple's)."""
    dtype: Dtype = "auto"
    """What the denoiser computes in; auto: bfloat16 on a GPU, float32 on a CPU."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the linear layers of both denoisers in 4 or 8 bits (bitsandbytes), where they would not fit otherwise."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed and options make the same images and figures."""

    @field_validator("concept", "attack", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("concept")
    @classmethod
    def _some_text(cls, value: list[str]) -> list[str]:
        if any(map(is_blank, value)):
            raise ValueError("say what was erased, or leave the option out")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "EvaluateConfig":
        if (self.reference is None) != (self.features is None):
            raise ValueError(
                "--reference and --features need each other: FID and KID compare features of two sets of images"
            )
        if self.attack and self.quantize != "none":
            raise ValueError("--attack does not work with --quantize; leave one of them out")
        if self.attack_prompts is not None and "prompts" not in self.attack:
            raise ValueError("--attack-prompts is for --attack prompts; add it or leave the file out")
        if self.attack_reference is not None and len(self.concept) > 1:
            raise ValueError("--attack-reference shows one concept; name one --concept, or leave it out")
        return self
