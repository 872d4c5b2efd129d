"""A training batch, and the interface of what batches are taken from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from esd_peft.models import PromptEmbeds
from esd_peft.training.learners import Outputs, Samples
from esd_peft.training.synonyms import SynonymMatch


@dataclass
class Batch:
    """`B` samples with a prompt each, and the teacher's answers that make their targets, on the student's device."""

    samples: Samples  # [B, ...] each
    embeds: PromptEmbeds  # [B, ...] each
    teacher: Outputs  # [2B, ...] each: e_null, then e_concept; of the contrastive method the noise, then the references
    eta: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32
    anchor: Outputs | None = None  # [B, ...] each; e_null where there is none
    sizes: Outputs = field(default_factory=dict)  # [] each: the mean square of what the concept does in that output
    num_concept_samples: int = 0  # how many of the samples erase

    def __len__(self) -> int:
        return len(self.eta)

    def split(self, size: int, of: range) -> Iterator["Batch"]:
        """Up to `size` of the samples `of` it at a time, weighted so that the parts' losses add up to the batch's."""
        for start in of[::size]:
            part = slice(start, min(start + size, of.stop))
            share = (part.stop - part.start) / len(self)
            yield Batch(
                {name: value[part] for name, value in self.samples.items()},
                {name: value[part] for name, value in self.embeds.items()},
                {name: value.unflatten(0, (2, -1))[:, part].flatten(0, 1) for name, value in self.teacher.items()},
                self.eta[part],
                self.weight[part] if share == 1 else self.weight[part] * share,
                None if self.anchor is None else {name: value[part] for name, value in self.anchor.items()},
                self.sizes,
            )


class Source(Protocol):
    """A source of training batches."""

    matches: Sequence[SynonymMatch] = ()  # the synonyms of each concept, where it looks for some

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Return its state: JSON values and tensors, the buffer under "buffer"."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the same batches that would have come; a buffer that is None is filled anew."""

    def load_matches(self, texts: list[list[list[str]]]) -> None:
        """Take the synonyms (`synonyms.to_texts`) of a training that is done."""
        return
