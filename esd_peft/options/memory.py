"""Options that say how a run fits into the device's memory."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from esd_peft.options.base import LEFT_OUT, Auto, Options, parse_bytes


class MemoryOptions(Options):
    """Memory: tensors that are on the device at a time, and their bits."""

    per_device_batch_size: Auto[Annotated[int, Field(ge=1, le=10**5)]] = LEFT_OUT
    """Samples of an optimizer step that are on the device at a time: gradients accumulate over the rest; left out: all, or
    as many as --memory-budget allows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: it takes less memory, and one forward pass more in each step."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Hold the frozen base's linear layers in 4 or 8 bits (bitsandbytes)."""
    offload: bool = False
    """Keep the frozen base in host memory and bring its layers to the device one by one: little memory, and slow. It
    implies --gradient-checkpointing."""
    memory_budget: str = "auto"
    """Device memory to stay within, 12GiB for example: micro-batches, gradient checkpointing, the base quantized or
    offloaded as far as that takes. auto: what the GPU has free; no bound on a CPU."""
    plan: bool = False
    """Say what the run would take (memory by phase, denoiser evaluations, the buffer's size) without loading weights, and
    stop."""

    @field_validator("memory_budget")
    @classmethod
    def _some_bytes(cls, value: str) -> str:
        if value != "auto":
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> "MemoryOptions":
        if self.offload and self.quantize != "none":
            raise ValueError("--offload does not work with --quantize; leave one of them out")
        return self
