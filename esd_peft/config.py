"""Every option, once: these fields are the command line, the YAML file and the Python API.

The docstring under a field is its help text.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from esd_peft.cli import CommandConfig, parse_bytes

Scope = Literal["esd-x", "esd-x-strict", "esd-u", "selfattn", "full"]
Adapter = Literal["lora", "loha", "lokr", "none"]
Optimizer = Literal["AdamW", "AdamW8bit", "PagedAdamW8bit"]
SCOPES: tuple[str, ...] = get_args(Scope)
_OF_TRAJECTORIES = (
    "eta", "hold", "map_to", "min_timestep", "max_timestep", "snr_gamma", "until", "rollout", "trajectories",
    "preserve_trajectories", "num_inference_steps", "guidance_scale", "anticipate", "refill_every",
)  # fmt: skip


class Concept(BaseModel):
    """One thing to erase. In YAML a plain string, or a map of these fields; what is left out comes from the config."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """What to erase, as a prompt would name it."""
    erase_from: str | None = None
    """Erase it from this only; left out: the config's erase_from."""
    map_to: str | None = None
    """What it becomes; left out: the config's map_to."""
    eta: Annotated[float, Field(ge=0, le=100)] | None = None
    """How far past nothing its target goes; left out: the config's eta."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Of its samples in the loss."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name", "erase_from", "map_to")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("name what to erase, for example --concept circle")
        return value and value.strip()

    @model_serializer(mode="wrap")
    def _to_a_string(self, serialize: SerializerFunctionWrapHandler) -> Any:
        fields = {name: value for name, value in serialize(self).items() if value != type(self).model_fields[name].default}
        return self.name if set(fields) == {"name"} else fields


_OnCommandLine: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PROMPT",
    instance_from_str=lambda words: words[0],  # validated, and so made a Concept, together with the whole config
    is_instance=lambda value: isinstance(value, Concept),
    str_from_instance=lambda concept: [concept.name],
)


class ModelOptions(CommandConfig):
    """How to read a model that is not simply a directory."""

    revision: str | None = None
    """Of a hub repository: a branch, tag or commit; left out: main."""
    variant: str | None = None
    """Of the weight files, "fp16" for example; left out: the plain ones."""
    checkpoint_config: str | None = None
    """For a single-file checkpoint: a diffusers directory or hub id with the configs and tokenizers that fit it; left
    out: the original model's, from the hub or its cache."""
    allow_pickle: bool = False
    """Read .ckpt and .bin files too. A pickle can run code: only from someone you trust."""


class EraseConfig(ModelOptions):
    """Erase concepts from a text-to-image diffusion model."""

    concept: Annotated[list[Annotated[Concept, _OnCommandLine]], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """What to erase, as a prompt would name it; repeat the option for several. In YAML each may be a map with a name
    and its own eta, weight, erase_from and map_to."""
    erase_from: str | None = None
    """Erase the concept from this only ("shirt": stripes stay elsewhere)."""
    map_to: str | None = None
    """What the concept becomes; left out: what the model draws without naming it."""
    wordings: Literal["auto", "bare"] = "auto"
    """auto: train on the concept in several wordings and beside other things; bare: only as given (the paper)."""
    preserve: Annotated[list[str], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A prompt that must stay as it is, held to the teacher on trajectories of its own; repeat for several."""
    preserve_file: Path | None = None
    """A text file of such prompts, one a line."""
    model: str | None = None
    """A pipeline directory in diffusers' layout (Stable Diffusion 1 to 3.5, SDXL, FLUX.1, PixArt-Σ, Sana), the hub id of
    one, or a single-file checkpoint; left out: the embedded shapes pipeline."""
    output: Path = Path("erased")
    """Where the adapter, the pictures and result.json go."""
    overwrite: bool = False
    """Replace what is in the output directory, if it is all this package's (docs/formats.md)."""

    scope: Scope | None = None
    """What learns: cross-attention (esd-x), its keys and values (esd-x-strict), all but it (esd-u), selfattn, or full; left
    out: esd-x-strict, or full with --robust."""
    adapter: Adapter = "lora"
    """The PEFT method, or none to train the scoped weights themselves."""
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Rank of the adapter; left out: 8 for each concept (16 with --robust), at most 64."""
    closed_form: bool = True
    """Start the layers that read the prompt from a closed form instead of from nothing (docs/objectives.md). Of
    adapters lora and none, with --objective esd."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """The adapter's output is scaled by alpha / rank; left out: alpha = rank."""

    objective: Literal["esd", "contrastive"] = "esd"
    """esd: the paper's guided target; contrastive: what some summaries of the paper describe (docs/objectives.md)."""
    reference: Path | None = None
    """With contrastive: a folder of pictures of the concept; left out: the teacher makes them."""
    eta: Annotated[float, Field(ge=0, le=100)] | None = None
    """How far past nothing the target goes (the paper's negative guidance; the authors' current scripts call its 1
    2); left out: 1, or 0 with --map-to."""
    hold: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each batch that holds the student to the teacher: without the concept, and on prompts to preserve; left
    out: 0.125, 0.25 with --erase-from, or 0.5 with --robust."""
    robust: Annotated[int, Field(ge=0, le=16)] = 0
    """Rounds in which words that bring the concept back are found and erased with it (docs/attacks.md). Each takes
    longer than an erasure without, and needs the text encoders beside the denoiser; 0: none."""
    null_space: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Layers that read the prompt learn only outside the subspace with this share of the energy of prompts to preserve
    (--preserve and a built-in list); 0: off. Of adapters lora and none; left out: 0.999, 0.99 with --erase-from, or 0.97
    with --robust."""
    min_timestep: Annotated[int, Field(ge=0, le=10**6)] = 0
    """Train from this timestep on (0: the last, least noisy one)."""
    max_timestep: Annotated[int, Field(ge=0, le=10**6)] = 1000
    """Train up to this timestep. Keys and values know no timestep: what they learn, and the closed form, acts at all."""
    snr_gamma: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Weigh timesteps by min-SNR with this gamma (5 is usual); left out: all alike."""
    until: Annotated[float, Field(gt=-100, lt=1)] | None = None
    """Stop as soon as this fraction of the concept's guided direction is left on held-out pairs; left out: never."""

    rollout: Literal["teacher", "student"] = "teacher"
    """Whose trajectories: the frozen teacher's, or the student's as it is now (the paper)."""
    trajectories: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Denoising trajectories in the bank; left out: 8, and 4 more for each concept after the first; three times that
    with --erase-from or where not all that learns is a LoRA under --null-space."""
    preserve_trajectories: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Trajectories of --preserve prompts in the bank; left out: one for each prompt."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Denoising steps of a trajectory; left out: 25, or 4 for few-step models."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] | None = None
    """Classifier-free guidance of the trajectories; left out: 3, or 1 (none) for models that are made to go without."""
    anticipate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With teacher rollouts: share of the trajectories driven by the guided target, to where the student will be."""
    rollout_batch_size: Annotated[int, Field(ge=1, le=10**5)] = 12
    """Trajectories denoised side by side."""
    refill_every: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps between refills of the bank; 1 is the paper's procedure (with student rollouts) and that of the
    authors' scripts (with the teacher's); left out: teacher rollouts are run once, student's every 25 steps."""

    max_train_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Optimizer steps; left out: 40, and 20 more for each concept after the first; eight times that with --erase-from or
    where not all that learns is a LoRA under --null-space; with --robust N 1 + 2 N times that (contrastive: 10 epochs)."""
    train_batch_size: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Samples a step; left out: 8, or 32 with --objective contrastive."""
    micro_batch_size: Annotated[int, Field(ge=1, le=10**5)] | None = None
    """Samples of a step that are on the device at a time; left out: all, or as many as --memory-budget allows."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate; left out: 0.01 where all that learns is a LoRA under --null-space, otherwise 0.001; 0.0001
    with --objective contrastive."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """The learning rate's course."""
    lr_warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Steps of warm-up, for the schedulers that have one."""
    optimizer: Optimizer = "AdamW"
    """PyTorch's AdamW, or bitsandbytes' 8-bit ones."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Gradients are clipped to this norm."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one forward more a step."""

    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """What the denoiser computes in; auto: bfloat16 on a GPU, float32 on a CPU. Adapters always stay in float32."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen base's linear layers in 4 or 8 bits (bitsandbytes)."""
    offload: bool = False
    """Keep the frozen base in host memory and bring its layers to the device one by one: little memory, and slow. Needs
    --gradient-checkpointing."""
    memory_budget: str = "auto"
    """Device memory to stay within, 12GiB for example: batches are split, activations recomputed, the base quantized or
    offloaded as far as that takes. auto: what the GPU has free; no bound on a CPU."""
    plan: bool = False
    """Say what the run would take, memory by phase, forwards and the bank's size, without loading weights, and stop."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the denoiser's blocks (torch.compile) for rollouts and training, which takes a minute or more; auto: on a
    GPU, from about 2000 calls of the denoiser on (a default run makes 65), a threshold that is not measured yet."""
    checkpoint_every: Annotated[int, Field(ge=1, le=10**9)] = 25
    """Optimizer steps between checkpoints in OUTPUT.checkpoint, which go when the run is done; also written on Ctrl-C."""
    resume: bool = False
    """Go on from the checkpoint of a run that was interrupted: the adapter becomes the same, bit for bit."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The same seed and config give the same adapter."""

    eval_seeds: Annotated[int, Field(ge=0, le=10**4)] = 2
    """Pictures a prompt, before and after; on the embedded pipeline they are judged. 0: none."""
    evaluate: bool = False
    """Take and judge them by python -m esd_peft.evaluate once the adapter is there; its report goes to evaluation/ in
    the output directory (docs/evaluation.md)."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Log the loss there too."""

    @field_validator("concept", "preserve", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict | Concept) else value

    @field_validator("memory_budget")
    @classmethod
    def _some_bytes(cls, value: str) -> str:
        if value != "auto":
            parse_bytes(value)
        return value

    @field_validator("preserve", "erase_from", "map_to")
    @classmethod
    def _some_text(cls, value: Any) -> Any:
        if any(not text.strip() for text in ([value] if isinstance(value, str) else value or [])):
            raise ValueError("say what, or leave the option out")
        return value.strip() if isinstance(value, str) else value and [text.strip() for text in value]

    @field_validator("concept")
    @classmethod
    def _named_once(cls, value: list[Concept]) -> list[Concept]:
        if not value:
            raise ValueError("name what to erase, for example --concept circle")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "EraseConfig":
        if self.quantize != "none" and self.adapter != "lora":
            raise ValueError(f"--quantize {self.quantize} works with --adapter lora only, not {self.adapter}")
        if self.offload and (self.adapter == "none" or self.quantize != "none" or self.compile == "on"):
            raise ValueError(
                "--offload does not work with --adapter none, --quantize or --compile on; leave one of them out"
            )
        if self.offload and not self.gradient_checkpointing:
            raise ValueError("--offload needs --gradient-checkpointing; add it")
        if self.adapter == "none" and (self.rank, self.alpha) != (None, None):
            raise ValueError("--rank and --alpha are an adapter's, and --adapter none has none; leave them out")
        if self.min_timestep >= self.max_timestep:
            raise ValueError("--min-timestep must be below --max-timestep")
        if self.trajectories is not None and self.trajectories < len(self.concept):
            raise ValueError(f"--trajectories must be at least the number of concepts, {len(self.concept)}")
        names = self.concept_names
        if doubled := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"--concept: {doubled[0]} is named twice; name each concept once")
        if self.null_space and (self.adapter in ("loha", "lokr") or self.learning_scope in ("esd-u", "selfattn")):
            raise ValueError("--null-space works with --adapter lora or none where keys and values learn; leave it out")
        if self.preserve_trajectories is not None and not (self.preserve or self.preserve_file or self.sources):
            raise ValueError("--preserve-trajectories needs something to preserve; add --preserve or leave it out")
        if self.hold and self.train_batch_size == 1:
            raise ValueError("--hold needs a --train-batch-size of at least 2; leave it out or raise the batch")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("--lr-warmup-steps needs another --lr-scheduler, for example constant_with_warmup")
        if self.until is not None and any(self.goal_of(concept) for concept in self.concept):
            raise ValueError("--until does not work with --map-to; leave one of them out")
        if self.until is not None and self.until <= -max(map(self.eta_of, self.concept)):
            raise ValueError("--until must be above -eta, which is where a finished student stands")
        if self.robust and (self.objective != "esd" or self.until is not None):
            raise ValueError("--robust works with --objective esd and without --until; leave one of them out")
        if self.robust and self.max_train_steps is not None and self.max_train_steps < 1 + 2 * self.robust:
            raise ValueError(f"--robust {self.robust} needs --max-train-steps of at least {1 + 2 * self.robust}")
        if self.evaluate and not self.eval_seeds:
            raise ValueError("--evaluate needs pictures; leave --eval-seeds 0 out")
        if self.reference is not None and len(self.concept) > 1:
            raise ValueError("--reference shows one concept; name one --concept, or leave it out")
        if self.objective == "contrastive":
            self._has_no_trajectories()
        elif self.reference is not None:
            raise ValueError("--reference works with --objective contrastive only; leave it out")
        return self

    def _has_no_trajectories(self) -> None:
        fields = type(self).model_fields
        given = [name for name in _OF_TRAJECTORIES if getattr(self, name) != fields[name].default]
        given += [
            n for n in ("eta", "map_to", "weight") for c in self.concept if getattr(c, n) != Concept.model_fields[n].default
        ]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} works with --objective esd only; leave it out")

    @property
    def sources(self) -> list[str]:
        """From what concepts are erased, where something is named: the rest of these is to stay, and elsewhere they do."""
        return [source for source in map(self.source_of, self.concept) if source]

    @property
    def learning_scope(self) -> Scope:
        """What learns. A word that brings the concept back is given away by what the other layers make of it, too."""
        return self.scope or ("full" if self.robust else "esd-x-strict")

    @property
    def adapter_rank(self) -> int:
        """The inner dimension of the adapter."""
        return self.rank or min((16 if self.robust else 8) * len(self.concept), 64)

    @property
    def bank_trajectories(self) -> int:
        """How many erasing trajectories fill the bank."""
        return self.trajectories or (4 + 4 * len(self.concept)) * (1 if self.easy else 3)

    @property
    def guided_steps(self) -> int:
        """Optimizer steps with --objective esd: 40, and 20 more for each concept after the first; more at the slower
        learning rate, and to tell apart what is to go from what shares its words; with --robust all rounds together."""
        few = 20 + 20 * len(self.concept)
        return few * (1 + 2 * self.robust if self.robust else 1 if self.easy else 8)

    @property
    def steps_per_bank(self) -> int | None:
        """Optimizer steps between refills of the bank; none: it is filled once."""
        return self.refill_every or (None if self.rollout == "teacher" else 25)

    @property
    def held_share(self) -> float:
        """Of each batch."""
        if self.hold is not None:
            return self.hold
        return 0.5 if self.robust else 0.25 if self.sources else 0.125

    @property
    def protected_energy(self) -> float:
        """The share of the energy of prompts to preserve that the adapter is kept off; 0: nothing is."""
        if self.null_space is not None:
            return self.null_space
        # what of the concept lies within the protected subspace is what an attacker can still say
        return 0.97 if self.robust else 0.99 if self.sources else 0.999

    @property
    def protected(self) -> bool:
        """Whether all that learns is a LoRA kept off the prompts to preserve, so that it may learn fast."""
        return self.protected_energy > 0 and self.learning_scope == "esd-x-strict" and self.adapter == "lora"

    @property
    def easy(self) -> bool:
        """Whether few steps are enough: nothing else is in the way of what is to go."""
        return self.protected and not self.sources

    @property
    def looks(self) -> bool:
        """Whether pictures are taken beside training; otherwise there are none, or the evaluation takes them."""
        return self.eval_seeds > 0 and not self.evaluate

    @property
    def concept_names(self) -> list[str]:
        """What is erased, as a prompt would name it: "striped circle" for striped from circle."""
        return [f"{concept.name} {self.source_of(concept)}".strip() for concept in self.concept]

    def source_of(self, concept: Concept) -> str:
        """What the concept is erased from; "" for everywhere."""
        return concept.erase_from or self.erase_from or ""

    def eta_of(self, concept: Concept) -> float:
        """How far past its goal the concept's target goes."""
        given = [eta for eta in (concept.eta, self.eta) if eta is not None]
        return given[0] if given else 0.0 if self.goal_of(concept) else 1.0

    def goal_of(self, concept: Concept) -> str | None:
        """What the concept becomes, where something is named."""
        return concept.map_to or self.map_to
