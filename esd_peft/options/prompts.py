"""Options that say what is erased, and what must stay."""

from typing import Annotated, Any, Literal

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

from esd_peft.options.base import LEFT_OUT, Auto, Options, ReadBy, is_blank

_GUIDED = ReadBy("layers", "denoiser", "trajectories")  # the methods with a guided target


class Concept(BaseModel):
    """One thing to erase. In YAML a plain string, or a map of these fields; what is left out comes from the group."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """What to erase, as a prompt would name it."""
    erase_from: str | None = None
    """Erase it from this only; left out: the group's erase_from."""
    map_to: str | None = None
    """What it becomes; left out: the group's map_to."""
    also_erase: tuple[str, ...] = ()
    """Other names and descriptions of it, beside the group's also_erase."""
    negative_guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    """The η of its guided target; left out: the group's negative_guidance."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """The weight of its samples in the loss."""

    @model_validator(mode="before")
    @classmethod
    def _from_a_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("name", "erase_from", "map_to")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and is_blank(value):
            raise ValueError("name what to erase, for example --concept circle")
        return value and value.strip()

    @field_validator("also_erase", mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        return _some_texts([value] if isinstance(value, str) else value)

    @model_serializer(mode="wrap")
    def _to_a_string(self, serialize: SerializerFunctionWrapHandler) -> Any:
        fields = {
            name: value
            for name, value in serialize(self).items()
            if value not in ([], type(self).model_fields[name].default)
        }
        return self.name if set(fields) == {"name"} else fields


_OnCommandLine: Any = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PROMPT",
    instance_from_str=lambda words: words[0],  # validated, and so made a Concept, together with the whole group
    is_instance=lambda value: isinstance(value, Concept),
    str_from_instance=lambda concept: [concept.name],
)


class PromptOptions(Options):
    """Concepts to erase, their anchors, and prompts to preserve."""

    concept: Annotated[list[Annotated[Concept, _OnCommandLine]], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """What to erase, as a prompt would name it; repeat the option for several. In YAML each may be a map with a name
    and its own negative_guidance, weight, erase_from and map_to."""
    erase_from: str | None = None
    """Erase the concept from this only: with --concept striped --erase-from shirt, stripes stay elsewhere."""
    map_to: Annotated[str | None, _GUIDED] = None
    """What the concept becomes; left out: what the model draws without naming it."""
    also_erase: Annotated[list[str], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A synonym or a description of the concept, erased with it ("sly red hunter"); repeat for several. In YAML each concept
    has its own."""
    negative_guidance: Annotated[Auto[Annotated[float, Field(ge=0, le=100)]], _GUIDED] = LEFT_OUT
    """η of the guided target e_null − η (e_concept − e_null), the paper's negative guidance (its 1 is 2 in the authors'
    current scripts); left out: 1, or for what is mapped to something 0, with the methods layers and denoiser 0.5."""
    prompt_templates: Literal["auto", "bare"] = "auto"
    """auto: train on the concept in several templates and beside other things; bare: only as given (the paper)."""
    preserve: Annotated[list[str], tyro.conf.UseAppendAction] = Field(default_factory=list)
    """A prompt whose images must not change, beside a built-in list of common ones (the retain set). The student learns the
    teacher's own prediction for it, with trajectories along a trajectory of its own; --closed-form also keeps the adapter
    out of the subspace of its embeddings. Repeat for several, or list them in the file of --config."""

    @field_validator("concept", "preserve", "also_erase", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict | Concept) else value

    @field_validator("preserve", "also_erase", "erase_from", "map_to")
    @classmethod
    def _some_text(cls, value: Any) -> Any:
        return _some_texts([value])[0] if isinstance(value, str) else _some_texts(value) if value else value

    @field_validator("concept")
    @classmethod
    def _some(cls, value: list[Concept]) -> list[Concept]:
        if not value:
            raise ValueError("name what to erase, for example --concept circle")
        return value

    @model_validator(mode="after")
    def _named_once(self) -> "PromptOptions":
        names = self.concept_names
        if doubled := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"--concept: {doubled[0]} is named twice; name each concept once")
        if self.also_erase and len(names) > 1:
            raise ValueError("--also-erase does not say of which --concept; in YAML each has its own also_erase")
        return self

    @property
    def sources(self) -> list[str]:
        """The sources that concepts are erased from: the concept goes in these, and stays elsewhere."""
        return [source for source in map(self.source_of, self.concept) if source]

    @property
    def concept_names(self) -> list[str]:
        """The names of the concepts in prompts: "striped circle" for striped from circle."""
        return [f"{concept.name} {self.source_of(concept)}".strip() for concept in self.concept]

    @property
    def erased_names(self) -> list[str]:
        """The names of the concepts, and all synonyms that are given."""
        return [name for concept in self.concept for name in self.names_of(concept)]

    def names_of(self, concept: Concept) -> list[str]:
        """The concept's names, as a prompt would have them, its own first."""
        return [
            f"{name} {self.source_of(concept)}".strip() for name in (concept.name, *concept.also_erase, *self.also_erase)
        ]

    def source_of(self, concept: Concept) -> str:
        """Return the source that the concept is erased from; "" for everywhere."""
        return concept.erase_from or self.erase_from or ""

    def goal_of(self, concept: Concept) -> str | None:
        """Return the anchor of the concept, if there is one."""
        return concept.map_to or self.map_to

    def eta_of(self, concept: Concept) -> float:
        """η of the concept's guided target."""
        given = [eta for eta in (concept.negative_guidance, self.negative_guidance) if eta is not None]
        return given[0] if given else 0.0 if self.goal_of(concept) else 1.0


def _some_texts(texts: Any) -> list[str]:
    """Without the space around them. Raises `ValueError` if one is empty."""
    if any(is_blank(str(text)) for text in texts):
        raise ValueError("say what, or leave the option out")
    return [str(text).strip() for text in texts]
