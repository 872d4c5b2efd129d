"""Which prompts a batch of wordings has: those that erase a concept, and those that hold everything else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.prompts.plan import Pair, names
from esd_peft.prompts.wordings import Candidate, Wordings
from esd_peft.training.names import Verdict

HOLD_WEIGHT = 10.0  # of a prompt that holds: few of them have to stand for all


@dataclass
class MixedPrompts:
    """Rows of the wordings' embeddings; the prompts that erase come first."""

    prompts: Tensor  # [B] int64
    neutrals: Tensor  # [B]; what holds is its own neutral and goal: no guidance moves its target
    goals: Tensor  # [B]
    eta: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32

    @property
    def are_mapped(self) -> bool:
        """Whether some become something else than what they are without the concept."""
        return not torch.equal(self.neutrals, self.goals)


def _held(verdicts: list[Verdict]) -> list[Candidate]:
    """What is something else than its concept, and than every other one: a citrus is no banana, but may be a tangerine."""
    erased = [[c.text for c in verdict.same if c.is_word] for verdict in verdicts]
    held = []
    for number, verdict in enumerate(verdicts):
        elsewhere = [word for words in (*erased[:number], *erased[number + 1 :]) for word in words]
        held += [c for c in verdict.others if not any(names(word, c.text) for word in elsewhere)]
    return held


class Mixture:
    """Batches without end, of so many prompts that erase and so many that hold.

    Of what erases a fifth is the plan's own, two fifths stand in random contexts, the rest under other names, if there are
    any. Of what holds two sevenths are near to the concepts, if anything is, and a seventh is the retain set; beside them
    what the options ask to keep has two ninths, if there is any.
    """

    def __init__(
        self, wordings: Wordings, verdicts: list[Verdict], erasing: int, holding: int, draws: torch.Generator
    ) -> None:
        same = [candidate for verdict in verdicts for candidate in verdict.same]
        near = [text for c in _held(verdicts) for text in (c.text, *(pair.prompt for pair in c.pairs))]
        self.draws, self.wordings, self.counts = draws, wordings, (erasing, holding)
        self.erasing = self._mixed(
            (1, [pair for pairs in wordings.plain for pair in pairs]),
            (2, [pair for pairs in wordings.contexts for pair in pairs]),
            (1, [pair for candidate in same if candidate.is_word for pair in candidate.pairs]),
            (1, [pair for candidate in same if not candidate.is_word for pair in candidate.pairs]),
        )
        erased = [candidate.text for candidate in same if candidate.is_word]
        held = (
            (4, [text for text in wordings.held if not any(names(name, text) for name in erased)]),
            (2, near),
            (1, wordings.listed),
            (2, wordings.given),
        )
        self.holding = self._mixed(*((share, [Pair(text, text) for text in texts]) for share, texts in held))

    def _mixed(self, *groups: tuple[int, list[Pair]]) -> tuple[MixedPrompts, Tensor]:
        """All pairs of the groups, and of each the chance to be drawn, so that each group has its share."""
        chances = torch.cat([torch.full((len(pairs),), share / max(1, len(pairs))) for share, pairs in groups])
        pairs = [pair for _, pairs in groups for pair in pairs]
        texts = zip(*((p.prompt, p.neutral, p.goal) for p in pairs), strict=True)
        prompts, neutrals, goals = map(self.wordings.index, texts)
        etas, weights = torch.tensor([p.eta for p in pairs]), torch.tensor([p.weight for p in pairs])
        return MixedPrompts(prompts, neutrals, goals, etas, weights), chances

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> MixedPrompts:
        parts = []
        for (side, chances), count in zip((self.erasing, self.holding), self.counts, strict=True):
            chosen = chances.multinomial(count, replacement=True, generator=self.draws)
            parts.append([column[chosen] for column in vars(side).values()])
        return MixedPrompts(*(torch.cat(column) for column in zip(*parts, strict=True)))
