"""The diagnosis at the end of a run: what short draws show, as the teacher judges them."""

import contextlib

import pytest
import torch

from esd_peft.models import open_family
from esd_peft.options.training import BufferOptions
from esd_peft.prompts.augmentation import Candidate
from esd_peft.training import diagnosis
from esd_peft.training.diagnosis import Diagnosis, Shown, choose_probes, diagnose
from esd_peft.training.draws import EncodedTexts
from esd_peft.training.synonyms import SynonymMatch
from runs import CPU, prepare

pytestmark = pytest.mark.usefixtures("in_full")


class Deaf:
    """A student that is given "" in the place of every prompt, and has a teacher that is not."""

    def __init__(self, student, null):
        self.student, self.null, self.teaches = student, null, False
        self.family, self.denoiser, self.device, self.dtype = student.family, student.denoiser, CPU, torch.float32

    @contextlib.contextmanager
    def teacher(self):
        self.teaches = True
        yield
        self.teaches = False

    def predict(self, inputs, timesteps, embeds):
        if not self.teaches:
            embeds = {name: value.expand(len(inputs), *value.shape[1:]) for name, value in self.null.items()}
        return self.student.predict(inputs, timesteps, embeds)


@pytest.fixture
def few_draws(monkeypatch):
    for name, count in {"PARAPHRASES": 6, "NEIGHBOURS": 2}.items():
        monkeypatch.setattr(diagnosis, name, count)


def diagnosed(deaf, guidance_scale=3.0):
    run = prepare("emoji", concept=["fox"], method="trajectories")
    probes = choose_probes(run.family, run.prompts, None, 1)
    probes.contexts = {f"a {name}": [f"an image of a {name}"] for name in ("violin", "car")}
    probes.texts.add(probes.all, run.family.encode(probes.all, CPU, torch.float32))
    student = Deaf(run.student, run.family.encode([""], CPU, torch.float32)) if deaf else run.student
    match = SynonymMatch([], [Candidate("a violin", [], True), Candidate("a car", [], True)])
    return diagnose(student, probes, [match], BufferOptions(guidance_scale=guidance_scale), 1)


def test_before_training_everything_is_drawn_as_before(few_draws):
    found = diagnosed(deaf=False)
    (fox,) = found.paraphrases.values()
    assert fox.before == fox.after > 3
    assert [*found.neighbours.values()] == [Shown(4, 4, 4)] * 2
    (advice,) = found.advice()
    assert advice.startswith("'fox' is still drawn by") and "--max-train-steps" in advice


def test_without_a_guidance_scale_it_draws_with_the_familys_own(few_draws):
    """The method contrastive reads none."""
    left_out, given = (diagnosed(deaf=False, guidance_scale=scale).to_dict() for scale in (None, 3.0))
    assert left_out == given and "pictures" not in given


def test_a_student_that_hears_nothing_has_lost_everything(few_draws):
    found = diagnosed(deaf=True)
    (fox,) = found.paraphrases.values()
    assert fox.after == 0 < fox.before and fox.interval[0] == 0
    assert all(shown.after <= 1 for shown in found.neighbours.values())
    (advice,) = found.advice()
    assert advice.startswith("no longer drawn as before: ") and "'a violin'" in advice and "--preserve" in advice


def test_with_few_words_paraphrases_are_prompts_of_the_plan():
    run = prepare("shapes", concept=["circle"], prompt_templates="auto")
    probes = choose_probes(run.family, run.prompts, None, 0)
    assert {*probes.paraphrases[0]} <= {pair.prompt for pair in run.prompts.concept_pairs[0]} and not probes.contexts


def test_held_out_prompts_are_none_of_those_of_training():
    run = prepare("emoji", concept=["fox"], method="trajectories")
    probes = choose_probes(run.family, run.prompts, None, 0)
    assert len(probes.paraphrases[0]) == diagnosis.PARAPHRASES
    assert not {*probes.paraphrases[0]} & {*run.prompts.texts} and all("fox" in text for text in probes.paraphrases[0])


def test_a_model_whose_noise_nobody_knows_is_not_diagnosed(monkeypatch):
    emoji = open_family("emoji")
    monkeypatch.setattr(type(emoji.noise_schedule), "is_known", False)
    run = prepare("emoji", concept=["fox"], method="trajectories")
    assert diagnose(run.student, choose_probes(run.family, run.prompts, None, 0), [], run.config.buffer, 0) == Diagnosis()


GONE = {"fox": Shown(16, 0, 16)}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            Diagnosis(GONE, neighbours={"a dog": Shown(4, 4, 4)}),
            "no held-out draw shows the concept",
        ),
        (Diagnosis({"fox": Shown(16, 4, 16)}), "'fox' is still drawn by 4 of 16 paraphrases: train longer"),
        (
            Diagnosis(GONE, {"a vixen": Shown(2, 2, 2), "a sly": Shown(2, 1, 2)}),
            "still drawn under 'a vixen': add",
        ),
        (
            Diagnosis(GONE, neighbours={"a dog": Shown(4, 1, 4), "a cat": Shown(2, 0, 4)}),
            "no longer drawn as before: 'a dog': add",
        ),
    ],
)
def test_what_it_advises(found, says):
    (advice,) = found.to_dict()["advice"]
    assert advice.startswith(says)


def test_texts_are_kept_once():
    texts = EncodedTexts()
    texts.add(["a", "b", "a"], {"tokens": torch.tensor([[1.0], [2.0], [1.0]])})
    texts.add(["b", "c"], {"tokens": torch.tensor([[2.0], [3.0]])})
    assert texts.get(["c", "a"], CPU)["tokens"].flatten().tolist() == [3, 1] and len(texts.embeds["tokens"]) == 3
