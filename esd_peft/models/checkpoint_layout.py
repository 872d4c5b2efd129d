"""Names of a kind of model and its parts in the tools for single-file checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointLayout:
    """The names of a kind in single-file checkpoints and in kohya's LoRA files."""

    architecture: str  # modelspec's
    version: str  # kohya's ss_base_model_version
    text_encoders: dict[str, str]  # part: prefix in a checkpoint
    original_lora_names: bool = False  # kohya trains this denoiser under the checkpoint's names, not diffusers'
