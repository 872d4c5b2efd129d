"""A list of prompts, asked as they are: what anyone may try."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from esd_peft.attacks.attack import Attack, AttackTarget
from esd_peft.attacks.victim import Victim
from esd_peft.errors import UserError
from esd_peft.io.text import UnreadableError, read_lines
from esd_peft.models import PromptEmbeds


class Prompts(Attack):
    """Each line of a text file is a prompt, in which {} is the concept, and [] are pieces of it.

    Without a file: the built-in ones, which are paraphrases, other contexts, misspellings and pieces.
    """

    name: ClassVar[str] = "prompts"
    unit: ClassVar[str] = "prompts"

    def __init__(self, path: Path | None = None) -> None:
        source = path or files("esd_peft.attacks") / "prompts.txt"
        try:
            self.templates = read_lines(source)
        except UnreadableError as error:
            raise UserError(f"--attack-prompts {path} cannot be read: {error}") from None
        if not self.templates:
            raise UserError(f"--attack-prompts {path} holds no prompt; write one a line")
        self.about = f"{len(self.templates)} prompts from {path or 'the built-in list'}"

    def own_prompts(self, concept: str) -> list[str]:
        return [template.replace("{}", concept) for template in self.templates]

    def attempts(self, victim: Victim, target: AttackTarget, prompts: list[str]) -> Iterator[tuple[int, PromptEmbeds]]:
        yield len(self.templates), victim.encode_frozen(prompts)
