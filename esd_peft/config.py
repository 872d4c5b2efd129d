"""The config of `python -m esd_peft.erase`: the groups of options of its rooms, and which of them do not go together."""

from pydantic import Field, model_validator

from esd_peft.adapters.options import HubOptions
from esd_peft.evaluation.options import ValidationOptions
from esd_peft.memory.options import MemoryOptions
from esd_peft.models.options import PretrainedOptions
from esd_peft.options import Options, flag
from esd_peft.prompts.options import Concept, PromptOptions
from esd_peft.runtime.options import RuntimeOptions
from esd_peft.training.options import BufferOptions, CheckpointOptions, StudentOptions, TrainingOptions

# what --objective contrastive has no use for
_OF_TRAJECTORIES = (
    "negative_guidance", "map_to", "trajectories", "preservation_trajectories", "num_inference_steps", "guidance_scale",
    "guided_rollout_ratio", "buffer_refresh_interval", "min_timestep", "max_timestep", "rollout", "preservation_ratio",
    "snr_gamma", "stop_at", "unprompted_guidance",
)  # fmt: skip


class EraseConfig(Options):
    """Erase concepts from a text-to-image diffusion model."""

    prompts: PromptOptions = Field(default_factory=PromptOptions.model_construct)
    pretrained: PretrainedOptions = Field(default_factory=PretrainedOptions)
    student: StudentOptions = Field(default_factory=StudentOptions)
    buffer: BufferOptions = Field(default_factory=BufferOptions)
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    memory: MemoryOptions = Field(default_factory=MemoryOptions)
    runtime: RuntimeOptions = Field(default_factory=RuntimeOptions)
    checkpoint: CheckpointOptions = Field(default_factory=CheckpointOptions)
    validation: ValidationOptions = Field(default_factory=ValidationOptions)
    hub: HubOptions = Field(default_factory=HubOptions)

    @model_validator(mode="after")
    def _fits_together(self) -> "EraseConfig":
        prompts, student, buffer, training, memory = (
            self.prompts, self.student, self.buffer, self.training, self.memory
        )  # fmt: skip
        if not prompts.concept:  # the group's default has none, for a command line to name one
            raise ValueError("--concept: name what to erase, for example --concept circle")
        if memory.quantize != "none" and student.adapter_type != "lora":
            raise ValueError(f"--quantize {memory.quantize} works with --adapter-type lora only, not {student.adapter_type}")
        if memory.offload and (student.adapter_type == "none" or self.runtime.compile == "on"):
            raise ValueError("--offload does not work with --adapter-type none or --compile on; leave one of them out")
        if training.max_train_steps == 0 and student.attention_steps == 0 and student.closed_form is False:
            raise ValueError("--max-train-steps 0 needs --attention-steps or --closed-form True; train for 1 or more")
        if student.attention_steps and (training.objective != "esd" or student.scope in ("esd-u", "selfattn")):
            raise ValueError("--attention-steps works with --objective esd and where cross-attention learns; leave it out")
        if training.augment_prompts and (student.attention_steps or training.max_train_steps == 0):
            raise ValueError("--augment-prompts True learns in --max-train-steps, not in --attention-steps; leave these out")
        if training.augment_prompts and (training.objective != "esd" or training.robust or buffer.rollout == "student"):
            raise ValueError(
                "--augment-prompts does not work with --objective contrastive, --robust or --rollout student; leave one out"
            )
        if buffer.trajectories is not None and buffer.trajectories < len(prompts.concept):
            raise ValueError(f"--trajectories must be at least the number of concepts, {len(prompts.concept)}")
        preserves = prompts.preserve or prompts.preserve_file or prompts.sources or training.robust
        if buffer.preservation_trajectories and not preserves:
            raise ValueError("--preservation-trajectories needs something to preserve; add --preserve or leave it out")
        if training.stop_at is not None and any(map(prompts.goal_of, prompts.concept)):
            raise ValueError("--stop-at does not work with --map-to; leave one of them out")
        if training.stop_at is not None and training.stop_at <= -max(map(prompts.eta_of, prompts.concept)):
            raise ValueError("--stop-at must be above -η (--negative-guidance), which is where a finished student stands")
        if training.reference is not None and len(prompts.concept) > 1:
            raise ValueError("--reference shows one concept; name one --concept, or leave it out")
        if training.objective == "contrastive":
            self._has_no_trajectories()
        return self

    def of_result(self) -> "EraseConfig":
        """What stands beside a result: the same whether the run took one go or was resumed, and whatever it replaced."""
        return self.replace(resume=False, overwrite=False)

    def _has_no_trajectories(self) -> None:
        given = [
            name
            for group in (self.prompts, self.buffer, self.training)
            for name, field in type(group).model_fields.items()
            if name in _OF_TRAJECTORIES and getattr(group, name) != field.default
        ]
        of_concepts = ("negative_guidance", "map_to", "weight")
        fields = Concept.model_fields
        given += [n for n in of_concepts for c in self.prompts.concept if getattr(c, n) != fields[n].default]
        if given:
            raise ValueError(f"{flag(given[0])} works with --objective esd only; leave it out")
