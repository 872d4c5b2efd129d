"""The config of `python -m esd_peft.erase`: the groups of options of its rooms, and which of them do not go together."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from esd_peft.options.base import Options, readers
from esd_peft.options.evaluate import ValidationOptions
from esd_peft.options.memory import MemoryOptions
from esd_peft.options.merge import HubOptions
from esd_peft.options.model import PretrainedOptions
from esd_peft.options.prompts import Concept, PromptOptions
from esd_peft.options.renamed import OLD, renamed
from esd_peft.options.runtime import RuntimeOptions
from esd_peft.options.training import BufferOptions, CheckpointOptions, StudentOptions, TrainingOptions


class EraseConfig(Options):
    """Erase concepts from a text-to-image diffusion model."""

    gone: ClassVar[Mapping[str, str]] = OLD
    usual: ClassVar[tuple[str, ...]] = (
        "concept", "model", "output", "preserve", "also_erase", "method", "memory_budget", "plan", "resume",
    )  # fmt: skip
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

    def __init__(self, **values: Any) -> None:
        super().__init__(**renamed(values))

    @model_validator(mode="after")
    def _fits_together(self) -> "EraseConfig":
        prompts, student, buffer, memory = self.prompts, self.student, self.buffer, self.memory
        if not prompts.concept:  # the group's default has none, for a command line to name one
            raise ValueError("--concept: name what to erase, for example --concept circle")
        if memory.quantize != "none" and student.adapter_type != "lora":
            raise ValueError(f"--quantize {memory.quantize} works with --adapter-type lora only, not {student.adapter_type}")
        if memory.offload and (student.adapter_type == "none" or self.runtime.compile == "on"):
            raise ValueError("--offload does not work with --adapter-type none or --compile on; leave one of them out")
        if buffer.trajectories is not None and buffer.trajectories < len(prompts.concept):
            raise ValueError(f"--trajectories must be at least the number of concepts, {len(prompts.concept)}")
        return self

    def of_result(self) -> "EraseConfig":
        """Return the config that stands beside a result: the same for a run in one go and a resumed one."""
        return self.replace(resume=False, overwrite=False)

    def unread(self, method: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The options that have a value though `method` does not read them, and the methods that do."""
        for group in vars(self).values():
            for name, field in type(group).model_fields.items() if isinstance(group, Options) else ():
                if (known := readers(field)) and method not in known and getattr(group, name) is not None:
                    yield name, known
        if method == "contrastive":  # a concept's own fields have no methods: of these only its name is read
            fields = Concept.model_fields
            for name in ("negative_guidance", "map_to", "weight"):
                if any(getattr(concept, name) != fields[name].default for concept in self.prompts.concept):
                    yield name, ("layers", "denoiser", "trajectories")
