"""Options that say what learns, on which samples, and how."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from esd_peft.models.options import GuidanceScale, InferenceSteps, Scope
from esd_peft.options import LEFT_OUT, Auto, Options

AdapterType = Literal["lora", "loha", "lokr", "none"]
Optimizer = Literal["AdamW", "AdamW8bit", "PagedAdamW8bit"]


class StudentOptions(Options):
    """What learns: which layers of the denoiser, and through which kind of adapter."""

    scope: Auto[Scope] = LEFT_OUT
    """Which layers learn: cross-attention (esd-x), its keys and values (esd-x-strict), it and the feed-forward layers
    (esd-x-ff), all but it (esd-u), selfattn, or full; left out: esd-x-ff with --attention-steps or --augment-prompts, full
    with --robust, esd-u with --unprompted-guidance, otherwise esd-x-strict."""
    adapter_type: AdapterType = "lora"
    """The PEFT method, or none to train the scoped weights themselves."""
    rank: Auto[Annotated[int, Field(ge=1, le=1024)]] = LEFT_OUT
    """Rank of the adapter; left out: 8 for each concept (16 with --attention-steps, --augment-prompts or --robust), at most
    64."""
    alpha: Auto[Annotated[float, Field(gt=0, le=1e6)]] = LEFT_OUT
    """The adapter's output is scaled by alpha / rank; left out: alpha = rank."""
    attention_steps: Auto[Annotated[int, Field(ge=0, le=10**6)]] = LEFT_OUT
    """Steps in which each cross-attention layer learns the guided target by itself, before the student does as a whole: in
    random contexts, under other names that the teacher knows, and held by the tokenizer's words (docs/attention.md); of
    Stable Diffusion 1.x, 2.x and XL. --learning-rate, --trajectories and what else is for batches is for --max-train-steps
    after these. 0: none; left out: 600 + 200 for each concept, or 0 where the tokenizer knows less
    than 500 words, and with another scope or objective, --null-space, --closed-form or --robust."""
    closed_form: Auto[bool] = LEFT_OUT
    """Start the layers that read the prompt from a closed-form edit like UCE's instead of from zero (docs/objectives.md). It
    needs --adapter-type lora or none, and --objective esd; left out: yes, but with --attention-steps
    or --augment-prompts."""
    null_space: Auto[Annotated[float, Field(ge=0, lt=1)]] = LEFT_OUT
    """Layers that read the prompt learn only outside the subspace that explains this share of the variance of the retain
    set (--preserve and a built-in list); 0: no such bound. It needs --adapter-type lora or none; left out: 0 with
    --attention-steps or --augment-prompts, otherwise 0.999, 0.99 with --erase-from, or 0.97 with --robust."""

    @model_validator(mode="after")
    def _fits_together(self) -> "StudentOptions":
        if self.adapter_type == "none" and not (self.rank is None and self.alpha is None):
            raise ValueError("--rank and --alpha are an adapter's, and --adapter-type none has none; leave them out")
        if self.null_space and (self.adapter_type in ("loha", "lokr") or self.scope in ("esd-u", "selfattn")):
            raise ValueError("--null-space works with --adapter-type lora or none where keys and values learn; leave it out")
        return self

    @property
    def protected(self) -> bool:
        """Whether all that learns is a LoRA kept off the retain set, so that it may learn fast."""
        return self.null_space > 0 and self.scope == "esd-x-strict" and self.adapter_type == "lora"


class BufferOptions(Options):
    """The denoising trajectories whose steps are the training samples, and the buffer that holds these."""

    rollout: Literal["teacher", "student"] = "teacher"
    """Who drives the trajectories: the frozen teacher, or the student as it is now (the paper)."""
    trajectories: Auto[Annotated[int, Field(ge=1, le=10**5)]] = LEFT_OUT
    """Denoising trajectories of the concepts in the buffer; left out: 4 + 4 for each concept; three times that with
    --erase-from, or with another scope or adapter than the defaults. --attention-steps and --augment-prompts have
    trajectories of their own, twelve or two for each concept, of ten steps at most."""
    preservation_trajectories: Auto[Annotated[int, Field(ge=0, le=10**5)]] = LEFT_OUT
    """Trajectories of --preserve prompts in the buffer; left out: one for each prompt."""
    num_inference_steps: Auto[InferenceSteps] = LEFT_OUT
    """Denoising steps of a trajectory; left out: 25, or 4 for few-step models."""
    guidance_scale: Auto[GuidanceScale] = LEFT_OUT
    """Classifier-free guidance of the trajectories; left out: 3, or 1 (none) for models that are made to go without."""
    guided_rollout_ratio: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With --rollout teacher: the share of the trajectories that are sampled with the guided target in place of the
    concept's prediction, as the finished student will sample them."""
    min_timestep: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Train from this timestep on (0 is the last, least noisy one)."""
    max_timestep: Annotated[int, Field(ge=0, le=10**6)] = 1000
    """Train up to this timestep. What keys and values learn acts at all timesteps nevertheless."""
    rollout_batch_size: Annotated[int, Field(ge=1, le=10**5)] = 12
    """Trajectories that are denoised side by side."""
    buffer_refresh_interval: Auto[Annotated[int, Field(ge=0, le=10**9)]] = LEFT_OUT
    """Optimizer steps after which the buffer is filled anew; 0: it is filled once; 1 is the paper's procedure (with
    --rollout student) and that of the authors' scripts (with teacher); left out: 0 with teacher rollouts, 25 with
    student rollouts."""

    @model_validator(mode="after")
    def _fits_together(self) -> "BufferOptions":
        if self.min_timestep >= self.max_timestep:
            raise ValueError("--min-timestep must be below --max-timestep")
        return self


class TrainingOptions(Options):
    """The objective, and how its optimizer goes."""

    objective: Literal["esd", "contrastive"] = "esd"
    """esd: the paper's guided target; contrastive: images of the concept as negative examples, which some summaries of the
    paper describe and which erases nothing (docs/objectives.md)."""
    reference: Path | None = None
    """With contrastive: a folder of images of the concept; left out: the teacher makes them."""
    preservation_ratio: Auto[Annotated[float, Field(ge=0, lt=1)]] = LEFT_OUT
    """The share of each batch that holds the student to the teacher: at prompts without the concept, and at --preserve
    prompts; left out: 0.125, 0.25 with --erase-from, 1/3 with --augment-prompts, or 0.5 with --robust."""
    augment_prompts: Auto[bool] = LEFT_OUT
    """Train on the concept in random contexts too, and under other names that the teacher knows, held by the tokenizer's
    words (docs/attention.md), at x_t of a few trajectories; left out: yes where the model has no cross-attention that could
    learn from these by itself, its tokenizer knows 500 words, and no other way to erase is asked for."""
    unprompted_guidance: Annotated[float, Field(ge=0, le=100)] = 0.0
    """How far prompts that do not name the concept are guided away from it, like η, at what the model draws along the
    concept's own trajectories: for what shows without being named, as nudity and watermarks do; 3 is strong. What resembles
    the concept pays for it (docs/attention.md)."""
    robust: Annotated[int, Field(ge=0, le=16)] = 0
    """Adversarial rounds, along trajectories: in each, prompts that bring the concept back are found and erased with it.
    Each takes longer than an erasure without, and needs the text encoders beside the denoiser. Where the tokenizer knows 500
    words --augment-prompts True withstood more (docs/attacks.md)."""
    snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Weigh timesteps in the loss by min-SNR with this gamma (5 is usual); left out: all count alike."""
    stop_at: Annotated[float, Field(gt=-100, lt=1)] | None = None
    """Stop early, as soon as the student's prediction on held-out trajectories has come so far: 1 is e_concept, where it
    begins, 0 is e_null, and −η is the guided target; left out: all steps are taken."""
    max_train_steps: Auto[Annotated[int, Field(ge=0, le=10**9)]] = LEFT_OUT
    """Optimizer steps; left out: 0 with --attention-steps, 80 + 80 for each concept with --augment-prompts, otherwise 20 +
    20 for each concept; 8 times that with --erase-from, or with another scope or adapter than the defaults; with --robust N
    instead 1 + 2 N times (--objective contrastive: 10 epochs)."""
    train_batch_size: Auto[Annotated[int, Field(ge=1, le=10**5)]] = LEFT_OUT
    """Samples in an optimizer step; left out: 8, 12 with --augment-prompts, or 32 with --objective contrastive."""
    learning_rate: Auto[Annotated[float, Field(gt=0, le=1)]] = LEFT_OUT
    """Peak learning rate; left out: 0.01 for a LoRA on esd-x-strict under --null-space, which the defaults are; otherwise
    0.001; 0.003 for an adapter with --augment-prompts; 0.0001 with --objective contrastive."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """How the learning rate changes from step to step."""
    lr_warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Steps of warm-up, for the schedulers that have one."""
    optimizer: Optimizer = "AdamW"
    """PyTorch's AdamW, or one of bitsandbytes' with 8-bit states."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Gradients are clipped to this norm."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed and config give the same adapter."""

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainingOptions":
        if self.preservation_ratio and self.train_batch_size == 1:
            raise ValueError("--preservation-ratio needs a --train-batch-size of at least 2; leave it out or raise that")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr-warmup-steps needs another --lr-scheduler, for example constant_with_warmup")
        if self.robust and (self.objective != "esd" or self.stop_at is not None):
            raise ValueError("--robust works with --objective esd and without --stop-at; leave one of them out")
        if self.robust and self.max_train_steps is not None and self.max_train_steps < 1 + 2 * self.robust:
            raise ValueError(f"--robust {self.robust} needs --max-train-steps of at least {1 + 2 * self.robust}")
        if self.reference is not None and self.objective != "contrastive":
            raise ValueError("--reference works with --objective contrastive only; leave it out")
        return self


class CheckpointOptions(Options):
    """Where the result goes, and what an interrupted run leaves to go on from."""

    output: Path = Path("erased")
    """The directory for the adapter, the images and result.json."""
    overwrite: bool = False
    """Replace the adapter in the output directory, if nothing else lies there (docs/formats.md)."""
    checkpointing_steps: Annotated[int, Field(ge=1, le=10**9)] = 25
    """Optimizer steps between checkpoints in OUTPUT.checkpoint, which go when the run is done; one is also written on
    Ctrl-C. Of --attention-steps an eighth lies between two."""
    resume: bool = False
    """Go on from the checkpoint of a run that was interrupted: the adapter becomes the same, bit for bit."""
