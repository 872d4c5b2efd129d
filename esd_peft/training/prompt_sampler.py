"""Draws the prompts of a batch: those that erase a concept, and those that preserve everything else."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esd_peft.prompts.augmentation import Candidate, PromptTable
from esd_peft.prompts.plan import Pair, mentions
from esd_peft.training.synonyms import SynonymMatch

PRESERVATION_WEIGHT = 10.0  # of a preservation prompt: few of them have to stand for all


@dataclass
class PromptBatch:
    """Indices into the prompt table's embeddings. The prompts that erase come first."""

    prompts: Tensor  # [B] int64; gives e_concept
    neutrals: Tensor  # [B]; the prompt without the concept, gives e_null
    goals: Tensor  # [B]; the anchor prompt, gives e_anchor; a preservation prompt is its own neutral and anchor: unguided
    eta: Tensor  # [B] fp32
    weight: Tensor  # [B] fp32

    @property
    def are_mapped(self) -> bool:
        """True if some pairs have an anchor other than the neutral prompt."""
        return not torch.equal(self.neutrals, self.goals)


def _preserved(matches: list[SynonymMatch]) -> list[Candidate]:
    """Return the neighbours of each concept that are no synonym of another erased concept.

    "Citrus" is a neighbour of "banana". It is not preserved if "tangerine" is erased too and "citrus" is its synonym.
    """
    erased = [[c.text for c in match.synonyms if c.is_word] for match in matches]
    kept = []
    for number, match in enumerate(matches):
        elsewhere = [word for words in (*erased[:number], *erased[number + 1 :]) for word in words]
        kept += [c for c in match.others if not any(mentions(word, c.text) for word in elsewhere)]
    return kept


class PromptSampler:
    """Yield batches of `erasing` prompts that erase and `preserving` prompts that preserve, without end.

    Each group of prompts has a weight, and empty groups have none. Its share is its weight over the sum of weights:

    - prompts that erase: the plan's own 1, random contexts 2, synonyms that are words 1, synonyms that are phrases 1;
    - preservation prompts: unrelated 4, neighbours 2, names that share a word with the concept 2, the retain set 1,
      the prompts of --preserve 2.
    """

    def __init__(
        self, table: PromptTable, matches: list[SynonymMatch], erasing: int, preserving: int, draws: torch.Generator
    ) -> None:
        synonyms = [candidate for match in matches for candidate in match.synonyms]
        near, sharing = (
            [
                text
                for c in _preserved(matches)
                if c.shares_word == shares
                for text in (c.text, *(pair.prompt for pair in c.pairs))
            ]
            for shares in (False, True)
        )
        self.draws, self.table, self.counts = draws, table, (erasing, preserving)
        self.erasing = self._mixed(
            (1, [pair for pairs in table.plain for pair in pairs]),
            (2, [pair for pairs in table.contexts for pair in pairs]),
            (1, [pair for candidate in synonyms if candidate.is_word for pair in candidate.pairs]),
            (1, [pair for candidate in synonyms if not candidate.is_word for pair in candidate.pairs]),
        )
        undecided = [candidate for match in matches for candidate in match.undecided if candidate.shares_word]
        # prompts with a word of the concept's own name are unrelated only as far as the teacher says so
        related = [candidate.text for candidate in (*synonyms, *undecided) if candidate.is_word]
        unrelated, retained = (
            [text for text in texts if not any(mentions(name, text) for name in related)]
            for texts in (table.unrelated, table.retained)
        )
        preserved = (
            (4, unrelated),
            (2, near),
            (2, sharing),
            (1, retained),
            (2, table.preserved),
        )
        self.preserving = self._mixed(*((share, [Pair(text, text) for text in texts]) for share, texts in preserved))

    def _mixed(self, *groups: tuple[int, list[Pair]]) -> tuple[PromptBatch, Tensor]:
        """Return the pairs of the groups and the chance of each, so that each group has its share."""
        chances = torch.cat([torch.full((len(pairs),), share / max(1, len(pairs))) for share, pairs in groups])
        pairs = [pair for _, pairs in groups for pair in pairs]
        texts = zip(*((p.prompt, p.neutral, p.anchor_prompt) for p in pairs), strict=True)
        prompts, neutrals, goals = map(self.table.index, texts)
        etas, weights = torch.tensor([p.eta for p in pairs]), torch.tensor([p.weight for p in pairs])
        return PromptBatch(prompts, neutrals, goals, etas, weights), chances

    def __iter__(self) -> "PromptSampler":
        return self

    def __next__(self) -> PromptBatch:
        parts = []
        for (side, chances), count in zip((self.erasing, self.preserving), self.counts, strict=True):
            chosen = chances.multinomial(count, replacement=True, generator=self.draws)
            parts.append([column[chosen] for column in vars(side).values()])
        return PromptBatch(*(torch.cat(column) for column in zip(*parts, strict=True)))
