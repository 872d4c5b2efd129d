"""Text encoders, loaded once a run: whatever prompts a run needs are encoded here, before the denoiser is loaded."""

from types import TracebackType

import torch

from esd_peft.models.family import ModelFamily, PromptEmbeds
from esd_peft.runtime.devices import release


class TextEncoder:
    """A pipeline's tokenizers and text encoders on `device`, within the block; afterwards their memory is free again.

    Of a large encoder one layer at a time is on a GPU: the same embeddings, in little memory.
    """

    def __init__(self, family: ModelFamily, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.device, self.dtype = family, device, dtype
        self.pipe = family.load_encoders(device, dtype)

    def __enter__(self) -> "TextEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.pipe
        release(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings `[prompts, ...]` in host memory. The null prompt is ""."""
        return self.family.encode_many(self.pipe, prompts, self.device, torch.device("cpu"))
