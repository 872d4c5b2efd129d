"""Options that say what learns, on which samples, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from esd_peft.options.base import LEFT_OUT, Auto, Options, ReadBy
from esd_peft.options.model import GuidanceScale, InferenceSteps, Scope

Method = Literal["layers", "denoiser", "trajectories", "contrastive"]
BY_PROMPTS = ("layers", "denoiser")  # methods that learn from many prompts
_GUIDED = ReadBy(*BY_PROMPTS, "trajectories")  # those with a guided target
_TRAJECTORIES = ReadBy("trajectories")
AdapterType = Literal["lora", "loha", "lokr", "none"]
Optimizer = Literal["AdamW", "AdamW8bit", "PagedAdamW8bit"]


class StudentOptions(Options):
    """The student: the layers that learn, and the kind of adapter."""

    scope: Auto[Scope] = LEFT_OUT
    """Which layers learn: cross-attention (esd-x), its keys and values (esd-x-strict), it and the feed-forward layers
    (esd-x-ff), all but it (esd-u), selfattn, or full; left out: esd-x-ff with the methods layers and denoiser, esd-u with
    --unprompted-guidance, otherwise esd-x-strict."""
    adapter_type: AdapterType = "lora"
    """The PEFT method, or none to train the scoped weights themselves."""
    rank: Auto[Annotated[int, Field(ge=1, le=1024)]] = LEFT_OUT
    """Rank of the adapter; left out: 8 for each concept (16 with the methods layers and denoiser), at most 64."""
    alpha: Auto[Annotated[float, Field(gt=0, le=1e6)]] = LEFT_OUT
    """The adapter's output is scaled by alpha / rank; left out: alpha = rank."""
    closed_form: Annotated[Auto[bool], _TRAJECTORIES] = LEFT_OUT
    """Start the layers that read the prompt from a closed-form edit like UCE's instead of from zero, and let them learn only
    in the null space of the retain set (--preserve and a built-in list): outside the subspace that explains 99.9 % of its
    variance, 99 % with --erase-from (docs/objectives.md). It needs --adapter-type lora or none; left out: yes."""

    @model_validator(mode="after")
    def _fits_together(self) -> "StudentOptions":
        if self.adapter_type == "none" and not (self.rank is None and self.alpha is None):
            raise ValueError("--rank and --alpha are an adapter's, and --adapter-type none has none; leave them out")
        if self.closed_form and (self.adapter_type in ("loha", "lokr") or self.scope in ("esd-u", "selfattn")):
            raise ValueError("--closed-form needs --adapter-type lora or none, where keys and values learn; leave it out")
        return self

    @property
    def protected(self) -> bool:
        """True if the student is a LoRA that is kept off the retain set, so that it may learn fast."""
        return bool(self.closed_form) and self.scope == "esd-x-strict" and self.adapter_type == "lora"


class BufferOptions(Options):
    """The denoising trajectories whose steps are the training samples, and the buffer that holds these."""

    rollout: Annotated[Auto[Literal["teacher", "mixed", "student"]], _TRAJECTORIES] = LEFT_OUT
    """The prediction that drives the trajectories. teacher: the frozen teacher's of the concept; mixed: for half of them
    its guided target instead, as the finished student will sample; student: the student's as it is now (the paper); left
    out: mixed."""
    trajectories: Annotated[Auto[Annotated[int, Field(ge=1, le=10**5)]], _TRAJECTORIES] = LEFT_OUT
    """Denoising trajectories of the concepts in the buffer, beside one for each --preserve prompt; left out: 4 + 4 for each
    concept; three times that with --erase-from, or with another scope or adapter than the defaults. The methods
    layers and denoiser have twelve trajectories or more, two or three for each concept."""
    num_inference_steps: Annotated[Auto[InferenceSteps], _GUIDED] = LEFT_OUT
    """Denoising steps of a trajectory; left out: 25, or 4 for few-step models, and at most
    10 with the methods layers and denoiser."""
    guidance_scale: Annotated[Auto[GuidanceScale], _GUIDED] = LEFT_OUT
    """Classifier-free guidance of the trajectories; left out: 3, or 1 (none) for models that are made to go without."""
    rollout_batch_size: Annotated[int, Field(ge=1, le=10**5)] = 12
    """Trajectories that are denoised side by side."""
    buffer_refresh_interval: Annotated[Auto[Annotated[int, Field(ge=0, le=10**9)]], _TRAJECTORIES] = LEFT_OUT
    """Optimizer steps after which the buffer is filled anew; 0: it is filled once; 1 is the paper's procedure (with
    --rollout student) and that of the authors' scripts (with teacher); left out: 0, or 25 with student rollouts."""


class TrainingOptions(Options):
    """The method and its optimizer."""

    method: Auto[Method] = LEFT_OUT
    """The training method (layers, denoiser, trajectories or contrastive). layers: each cross-attention layer learns
    the guided target for its own output, from many prompts; denoiser: the denoiser as a whole learns it from the same
    prompts; trajectories: it learns from the concepts' own trajectories (the paper, with --rollout student); contrastive:
    images of the concept are negative examples, which some summaries of the paper describe and which erases nothing
    (docs/objectives.md). Left out: layers for Stable Diffusion 1.x, 2.x and XL, denoiser for all others, trajectories
    where the tokenizer knows less than 500 words."""
    preservation_ratio: Annotated[Auto[Annotated[float, Field(ge=0, lt=1)]], _GUIDED] = LEFT_OUT
    """The share of preservation prompts in each batch, for which the student learns the teacher's own prediction;
    left out: 0.5 with the method layers, 1/3 with denoiser, 0.125 with trajectories (0.25 with --erase-from)."""
    unprompted_guidance: Annotated[Auto[Annotated[float, Field(ge=0, le=100)]], _GUIDED] = LEFT_OUT
    """η of prompts that do not name the concept, at samples of the concept's own trajectories: for implicit concepts such as
    nudity and watermarks, which appear without being named; 3 is strong. Neighbours of the concept lose images
    (docs/attention.md); left out: 0."""
    max_train_steps: Auto[Annotated[int, Field(ge=0, le=10**9)]] = LEFT_OUT
    """Optimizer steps; left out: 150 + 50 for each concept with the method layers, 80 + 80 with denoiser, 20 + 20 with
    trajectories (8 times that with --erase-from, or with another scope or adapter than the defaults), and 10 epochs with
    contrastive."""
    train_batch_size: Auto[Annotated[int, Field(ge=1, le=10**5)]] = LEFT_OUT
    """Samples in an optimizer step; left out: 32 with the methods layers and contrastive, 12 with denoiser, 8 with
    trajectories."""
    learning_rate: Auto[Annotated[float, Field(gt=0, le=1)]] = LEFT_OUT
    """Peak learning rate; left out: 0.003 for an adapter with the methods layers and denoiser, 0.01 for a LoRA on
    esd-x-strict under --closed-form, 0.0001 with contrastive, otherwise 0.001."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate changes from step to step."""
    optimizer: Optimizer = "AdamW"
    """PyTorch's AdamW, or one of bitsandbytes' with 8-bit states."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed and config give the same adapter."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingOptions":
        if self.preservation_ratio and self.train_batch_size == 1:
            raise ValueError("--preservation-ratio needs a --train-batch-size of at least 2; leave it out or raise that")
        return self


class CheckpointOptions(Options):
    """The output, and checkpoints of interrupted runs."""

    output: Path = Path("erased")
    """The directory for the adapter, the images and result.json."""
    overwrite: bool = False
    """Replace the adapter in the output directory, if nothing else lies there (docs/formats.md)."""
    resume: bool = False
    """Go on from the checkpoint of a run that was interrupted: the adapter becomes the same, bit for bit. One is written to
    OUTPUT.checkpoint every two minutes and on Ctrl-C, and goes when the run is done."""
