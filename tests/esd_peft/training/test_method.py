"""Methods: each as a whole, from the config to the adapter."""

import json

import pytest
import torch

from esd_peft import EraseConfig, UserError, erase
from esd_peft.adapters.saved import read_adapter
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import make_plan
from esd_peft.models import open_family
from esd_peft.prompts.augmentation import MANY_WORDS
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.monitor import Monitor
from esd_peft.training.trainer import Trainer
from families import draw_small, save_family
from pipelines import small_stable_diffusion
from runs import METHODS, method_of, prepare, shortest


class Seen(Monitor):
    """What a monitor is shown."""

    def __init__(self, *given):
        super().__init__(*given)
        self.steps, self.logged = [], []

    def look(self, step):
        self.steps.append(step)

    def log(self, values, step):
        self.logged.append((step, values["loss"]))


def learn(run):
    """Take all steps of the run; returns its trainer and what was shown."""
    method, seen = method_of(run), Seen(run.student, run.rollout.profiler)
    trainer = Trainer(method, run.config.training, run.config.memory, run.rollout.profiler)
    for batch in TrainingLoop(trainer, method.source, seen, None).batches():
        trainer.step(batch)
    return method, trainer, seen


def test_layers_learn_the_target_and_leave_the_teacher_alone(few, eager):
    run = prepare("emoji", concept="fox", method="layers", rank=4, max_train_steps=60)
    emoji, denoiser, table = run.family, run.student.denoiser, run.table
    inputs = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    rows = {name: value[torch.stack([table.neutrals[0], table.prompts[0]])] for name, value in table.embeds.items()}

    @torch.no_grad()
    def predict():
        return emoji.predict(denoiser, inputs, torch.tensor([300, 300]), rows)

    null, named = before = predict()
    frozen = {name: p.clone() for name, p in denoiser.named_parameters() if not p.requires_grad}
    method, trainer, seen = learn(run)
    assert seen.steps == [*range(61)]
    assert seen.logged == [*zip(range(10, 61, 10), trainer.losses, strict=True)]
    with run.student.teacher():
        assert torch.equal(predict(), before)
    after = predict()
    assert all(torch.equal(p, frozen[name]) for name, p in denoiser.named_parameters() if not p.requires_grad)
    assert (after[1] - null).norm() < 0.8 * (named - null).norm(), "the concept draws what its absence does"
    assert (after[0] - null).norm() < 0.3 * (named - null).norm(), "and its absence what it did"
    assert trainer.losses[-1] < trainer.losses[0]
    (match,) = method.source.matches
    assert run.rollout.profiler.nfe == 12 * 10 * 2 + match.nfe
    assert 2 <= match.nfe / len(method.source.table.candidates[0]) < 6


def parts_of(names):
    """Which parts of transformer blocks the parameters belong to."""
    return {next((part for part in ("attn1", "attn2", "ff") if part in name.split(".")), "other") for name in names}


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [("layers", "sd", {"unprompted_guidance": 2.0}), ("layers", "sd", {"adapter_type": "none", "rank": None}),
     ("layers", "sd", {"scope": "esd-x-strict"}), ("layers", "sd", {"scope": "full"}), ("layers", "sdxl", {}),
     ("denoiser", "sd", {"unprompted_guidance": 2.0}), ("denoiser", "sd3", {}), ("denoiser", "flux dev", {}),
     ("denoiser", "pixart", {}), ("denoiser", "chroma", {}),
     ("trajectories", "sd", {"unprompted_guidance": 2.0}), ("contrastive", "sd", {})],
)  # fmt: skip
def test_whole_runs_of_small_models(few, eager, tmp_path, monkeypatch, method, kind, options):
    draw_small(monkeypatch)
    path = small_stable_diffusion(tmp_path / "model") if kind == "sd" else save_family(kind, tmp_path / "model")
    given = shortest(method, max_train_steps=2, **({"trajectories": 2} if method == "trajectories" else {})) | options
    config = EraseConfig(concept=["circle", "red"], model=str(path), output=tmp_path / "out", **given)
    result = erase(config)
    family = open_family(str(path))
    assert result["nfe"] > 0
    if method != "contrastive":  # of which no plan is made
        assert result["nfe"] <= make_plan(config, *resolve(config, family), family).nfe
    assert {*result["synonyms"]} == ({"circle", "red"} if method in ("layers", "denoiser") else set())
    erasing = {"layers": 16, "denoiser": 8, "trajectories": 7, "contrastive": 32}[method]
    assert result["training_samples"] == 2 * erasing
    assert {"rollout" if method != "contrastive" else "references", "train", "save"} <= {*result["seconds"]}
    assert 0 < result["loss"]["last"] < 100
    assert json.loads((tmp_path / "out" / "result.json").read_text())["loss"] == result["loss"]
    base = family.load_denoiser(torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    changed = {n for n, p in read_adapter(tmp_path / "out").apply(base).named_parameters() if not torch.equal(p, before[n])}
    assert changed
    if method == "layers":
        learns = {"attn2"} if options.get("scope") == "esd-x-strict" else {"attn2", "ff"}
        assert parts_of(changed) == learns


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_no_number_is_said(few, eager, small_sd, tmp_path, monkeypatch, method):
    take = Trainer.step

    def spoilt(trainer, batch):
        if trainer.taken == 3:
            batch.weight.mul_(float("nan"))
        take(trainer, batch)

    monkeypatch.setattr(Trainer, "step", spoilt)
    given = shortest(method, max_train_steps=12, train_batch_size=4)
    says = "no longer a number at step 4" + ("; lower" if method == "layers" else r" \(timesteps [\d., -]+\); lower")
    with pytest.raises(UserError, match=says + " --learning-rate"):
        erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


def test_models_without_such_layers_say_so(tmp_path):
    made = save_family("pixart", tmp_path / "model")
    with pytest.raises(UserError, match=r"--method layers needs separable cross-attention, .* use --method denoiser"):
        erase(EraseConfig(concept="circle", model=str(made), method="layers", output=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_knows_no_word_cannot_preserve_anything(tmp_path):
    model = save_family("z-image", tmp_path / "model")
    config = EraseConfig(concept="circle", model=str(model), output=tmp_path / "out", method="denoiser", device="cpu")
    with pytest.raises(UserError, match=r"preserves by words, .* knows none as a whole; use --method trajectories"):
        erase(config)
    assert not (tmp_path / "out").exists()


def test_the_denoiser_learns_where_cross_attention_cannot_by_itself(monkeypatch):
    emoji = open_family("emoji")
    assert len(emoji.whole_words()) >= MANY_WORDS
    assert resolve(EraseConfig(concept="fox", device="cpu"), emoji)[0].training.method == "layers"
    monkeypatch.setattr(type(emoji), "cross_attention", lambda self, denoiser: [])
    emoji = open_family("emoji")
    resolved, prompts = resolve(EraseConfig(concept="fox", device="cpu"), emoji)
    student, training = resolved.student, resolved.training
    assert (training.method, student.scope, student.rank) == ("denoiser", "esd-x-ff", 16)
    assert student.closed_form is None
    assert (training.max_train_steps, training.train_batch_size, training.learning_rate) == (160, 12, 3e-3)
    assert resolve(resolved, emoji) == (resolved, prompts)
    for options in ({"trajectories": 8}, {"closed_form": True}, {"rollout": "student"}):
        with pytest.raises(UserError, match="is not read by --method denoiser"):
            resolve(EraseConfig(concept="fox", device="cpu", **options), emoji)
