"""The diagnosis at the end of a run, on a model for which there is no classifier: is the concept gone, and what is harmed?

Teacher and student draw the same prompts from the same noise, prompts that training has not had, and the teacher judges what
each draw shows (`draws.Judge`). Three questions are answered: do paraphrases still show the concept; under which synonyms is
it still there; and are neighbours still drawn, those that share a word with the concept first. How well this agrees with a
classifier of images is in docs/evaluation.md.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from esd_peft.evaluation.intervals import wilson
from esd_peft.models import ModelFamily
from esd_peft.models.sampling import before_after_grid, to_image
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.augmentation import MANY_WORDS, PromptTable
from esd_peft.prompts.plan import PromptPlan, mentions, spread
from esd_peft.runtime.seeds import seed_for
from esd_peft.training.draws import LEVELS, STEPS, Draw, EncodedTexts, Judge, decode
from esd_peft.training.student import Student
from esd_peft.training.synonyms import SynonymMatch, neighbours
from esd_peft.training.work import sampled

CONCEPTS = 4  # that are diagnosed, where there are more
PARAPHRASES, NAMES, NEIGHBOURS = 16, 6, 8  # prompts of each kind, of all concepts together
DRAWS = {"synonyms": 2, "neighbours": 4}  # of each synonym and each neighbour
TEMPLATES = ("an image of {}", "{} on a table", "a drawing of {}", "there is {} here", "{}, close up")  # not of training
CANDIDATES = 4  # among which the judge decides of a draw, at most
PICTURES = 7  # of the sheet, at most
LEFT, LOST = 0.1, 0.5  # shares from which on the advice is to change something


@dataclass(frozen=True)
class Shown:
    """Counts of draws, of `count`, in which the teacher finds what the prompt asks for: its own draws, and the student's."""

    before: int
    after: int
    count: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share after erasing."""
        return wilson(self.after, self.count)

    @property
    def known(self) -> bool:
        """The teacher itself draws it in three draws of four: otherwise what is lost says nothing."""
        return 4 * self.before >= 3 * self.count

    @property
    def lost(self) -> float:
        """The share that is lost of what the teacher draws."""
        return 1 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        return f"{self.before} of {self.count} → {self.after} of {self.count}"


@dataclass
class Probes:
    """Held-out prompts, encoded with the others of a run."""

    concepts: list[str]  # the plain prompt of each concept that is diagnosed
    neutrals: list[str]  # and what stands in its place
    paraphrases: list[list[str]]  # of each of these
    contexts: dict[str, list[str]]  # of each candidate for a synonym or neighbour
    listed: list[str]  # what is preserved, where there are no candidates
    texts: EncodedTexts = field(default_factory=EncodedTexts)

    @property
    def all(self) -> list[str]:
        """The distinct texts."""
        groups = [*self.paraphrases, *self.contexts.values()]
        texts = ["", *self.concepts, *self.neutrals, *self.listed, *self.contexts, *(t for group in groups for t in group)]
        return list(dict.fromkeys(texts))


@dataclass
class Diagnosis:
    """The findings; empty where nothing was drawn."""

    paraphrases: dict[str, Shown] = field(default_factory=dict)  # by concept: draws that show it
    synonyms: dict[str, Shown] = field(default_factory=dict)  # by synonym: draws that show the concept
    neighbours: dict[str, Shown] = field(default_factory=dict)  # by neighbour: draws that show itself, the worst first
    nfe: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # samples by kind of call (`flops.CallCosts`)
    pictures: Image.Image | None = None  # of each question its worst draw, by the teacher above and by the student below

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON values for `result.json`."""
        found = asdict(replace(self, pictures=None)) | {"advice": [*self.advice()]}
        del found["pictures"], found["calls"]
        return found

    def advice(self) -> Iterator[str]:
        """Yield what to do, one line a finding; one line says so where nothing has to be done."""
        fine = bool(self.paraphrases)
        for concept, shown in self.paraphrases.items():
            if shown.after > LEFT * shown.count:
                fine = False
                yield (
                    f"{concept!r} is still drawn by {shown.after} of {shown.count} paraphrases: train longer "
                    "(--max-train-steps) or at a higher --learning-rate"
                )
        still = [name for name, shown in self.synonyms.items() if 2 * shown.after > shown.count]
        if still:
            fine = False
            yield f"still drawn under {_quoted(still)}: add --also-erase with that name"
        harmed = [name for name, shown in self.neighbours.items() if shown.known and shown.lost >= LOST]
        if harmed:
            fine = False
            yield f"no longer drawn as before: {_quoted(harmed)}: add --preserve with that name"
        if fine:
            yield "no held-out draw shows the concept, and what is like it is drawn as before"


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def choose_probes(family: ModelFamily, plan: PromptPlan, table: PromptTable | None, seed: int) -> Probes:
    """Held-out contexts of the concepts and of their candidates: random words of the tokenizer's vocabulary.

    A tokenizer that knows few words has no other contexts than those of training.
    """
    pairs = spread(plan.concept_pairs, CONCEPTS)
    number = max(1, len(pairs))
    draws = random.Random(seed_for(seed, "diagnosis"))
    named = [*plan.concepts, *(name for group in plan.synonyms for name in group)]
    words = [word for word in family.whole_words() if not any(mentions(name, word) for name in named)]
    few = len(words) < MANY_WORDS

    def templates(text: str, count: int) -> list[str]:
        return family.read_whole(template.format(text) for template in draws.sample(TEMPLATES, min(count, len(TEMPLATES))))

    def contexts(text: str, count: int) -> list[str]:
        """A third in templates, the rest beside random words."""
        made = templates(text, count // 3)
        for _ in range(count - len(made)):
            first, second = draws.sample(words, 2)
            made.append(draws.choice((f"{first} {second}, {text}", f"{text}, {first} {second}", f"{text} and {first}")))
        return family.read_whole(made)

    each = PARAPHRASES // number
    paraphrases = [spread([p.prompt for p in group], each) if few else contexts(group[0].prompt, each) for group in pairs]
    candidates = [c.text for group in (table.candidates if table else []) for c in group if c.is_word or c.shares_word]
    listed = spread([text for text in plan.preserved_texts if text], NEIGHBOURS)
    held_out = {} if few else {text: templates(text, 2) for text in dict.fromkeys(candidates)}
    return Probes([g[0].prompt for g in pairs], [g[0].neutral for g in pairs], paraphrases, held_out, listed)


@torch.no_grad()
def diagnose(student: Student, probes: Probes, matches: list[SynonymMatch], options: BufferOptions, seed: int) -> Diagnosis:
    """Draw with teacher and student, and judge. What that costs is `Diagnosis.nfe`, apart from the run's own NFE.

    Empty for a model whose scheduler does not say what noise the denoiser was trained on (EDM).
    """
    if not student.family.noise_schedule.is_known:
        return Diagnosis()
    scale = float(sampled(options, student.family).guidance_scale)
    judge = Judge(student, probes.texts, scale, options.rollout_batch_size, seed)
    groups = _groups(probes, matches)
    made = _drawn(judge, [draw for group in groups for draw in group.draws])
    calls = Counter({"evaluation": judge.nfe - made.by_student, "student evaluation": made.by_student})
    result, start, rows = Diagnosis(nfe=judge.nfe, calls=calls), 0, []
    for group in groups:
        end = start + len(group.draws)
        shown = Shown(sum(made.before[start:end]), sum(made.after[start:end]), end - start)
        getattr(result, group.question)[group.subject] = shown
        # of what is erased a draw that still shows it, of what is kept one that is lost
        wrong = [i for i in range(start, end) if made.after[i] != (group.question == "neighbours")]
        rows.append((group.question, shown.lost, (wrong or [start])[0]))
        start = end
    result.neighbours = dict(sorted(result.neighbours.items(), key=lambda item: item[1].after - item[1].before))
    chosen = _chosen(rows)
    result.pictures = _sheet(student, made, chosen)
    result.calls["decoded image"] = 2 * len(chosen)
    return result


def most_calls(probes: Probes, family: ModelFamily, guidance_scale: float) -> Counter[str]:
    """Samples of a diagnosis by kind of call, at most: where few synonyms are found it takes less."""
    if not family.noise_schedule.is_known:
        return Counter()
    draws = sum(map(len, probes.paraphrases)) + NEIGHBOURS * DRAWS["neighbours"]
    draws += NAMES * DRAWS["synonyms"] if probes.contexts else 0
    drawing = draws * min(STEPS, family.num_inference_steps) * (2 if guidance_scale != 1 else 1)
    judging = 2 * len(LEVELS) * CANDIDATES * draws
    return Counter({"evaluation": drawing + judging, "student evaluation": drawing, "decoded image": 2 * PICTURES})


@dataclass
class _Group:
    question: str  # a field of `Diagnosis`
    subject: str
    draws: list[Draw]


def _groups(probes: Probes, matches: list[SynonymMatch]) -> list[_Group]:
    """The draws that answer the questions, without groups that have none."""
    number, near = max(1, len(probes.concepts)), neighbours(matches) or probes.listed
    near = [text for text in near if text in probes.texts.rows and text not in probes.concepts][:NEIGHBOURS]
    groups = []
    for i, (concept, neutral) in enumerate(zip(probes.concepts, probes.neutrals, strict=True)):
        among = tuple(dict.fromkeys((concept, neutral, *near[:2])))
        groups.append(_Group("paraphrases", concept, [Draw(text, among) for text in probes.paraphrases[i]]))
        match = matches[i] if i < len(matches) else SynonymMatch([], [])
        known = [c.text for c in (*match.undecided, *match.synonyms) if c.text in probes.contexts]
        for name in known[: NAMES // number]:
            draws = [Draw(text, among) for text in probes.contexts[name][: DRAWS["synonyms"]]]
            groups.append(_Group("synonyms", name, draws))
    for text in near:
        among = tuple(dict.fromkeys((text, *probes.concepts[:1], "", *[t for t in near if t != text][:1])))
        prompts = (probes.contexts.get(text) or [text]) * DRAWS["neighbours"]
        groups.append(_Group("neighbours", text, [Draw(prompt, among) for prompt in prompts[: DRAWS["neighbours"]]]))
    return [group for group in groups if group.draws]


@dataclass
class _Made:
    draws: list[Draw]
    latents: tuple[Tensor, Tensor]  # of the teacher, of the student
    before: list[bool]
    after: list[bool]
    by_student: int  # evaluations of the denoiser


def _drawn(judge: Judge, draws: list[Draw]) -> _Made:
    """Draw by teacher and student from the same noise, and let the teacher judge the draws."""
    with judge.student.teacher():
        before = judge.draw(draws)
    by_teacher = judge.nfe
    after = judge.draw(draws)
    by_student = judge.nfe - by_teacher
    return _Made(draws, (before, after), judge.shows_first(before, draws), judge.shows_first(after, draws), by_student)


def _chosen(worst: list[tuple[str, float, int]]) -> list[int]:
    """Two draws of paraphrases, two of synonyms, and three of the neighbours that lost the most."""
    chosen = []
    for question in ("paraphrases", "synonyms", "neighbours"):
        some = sorted((item for item in worst if item[0] == question), key=lambda item: -item[1])
        chosen += [row for *_, row in some[: 3 if question == "neighbours" else 2]]
    return chosen


def _sheet(student: Student, made: _Made, rows: list[int]) -> Image.Image | None:
    """These draws as pictures."""
    if not rows:
        return None
    names = [made.draws[i].prompt for i in rows]
    before, after = ([[to_image(image)] for image in decode(student, latents[rows])] for latents in made.latents)
    return before_after_grid(names, before, after)
