"""Cross-attention layer by layer: what the prompts are, who is another name, what is learned, and what stays."""

import json
from dataclasses import replace

import pytest
import torch

from esd_kernels import guided_mse_reference
from esd_peft import EraseConfig, UserError, erase
from esd_peft.adapters.saved import read_adapter
from esd_peft.defaults import resolve
from esd_peft.models import open_family
from esd_peft.prompts import wordings as module
from esd_peft.prompts.plan import names
from esd_peft.prompts.table import make_table
from esd_peft.prompts.wordings import encode_wordings, known_names
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training import attention, layers, mixture
from esd_peft.training.attention import AttentionTraining
from esd_peft.training.layers import ERASE, HOLD, AttentionLayer, LayerLoss, LayerStates, pairs_of_samples
from esd_peft.training.mixture import HOLD_WEIGHT, Mixture
from esd_peft.training.monitor import Monitor
from esd_peft.training.names import Verdict
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import make_student
from esd_peft.training.survey import survey
from esd_peft.training.work import count_survey_nfe
from families import save_family
from pipelines import small_stable_diffusion
from runs import CPU, OF_LAYERS, SHORTEST

FEW = replace(module.MANY_PROMPTS, contexts=24, fewest=24, held=24, phrases=16)


@pytest.fixture
def eager(monkeypatch):
    """The loss without the interpreter of Triton, which takes a second for each layer and step."""
    monkeypatch.setattr(layers, "guided_mse", guided_mse_reference)


@pytest.fixture
def few(monkeypatch):
    """Fewer prompts, so that a moment is enough."""
    for name, value in {"WORDS": 300, "NEAR_WORDS": 4, "MANY_PROMPTS": FEW}.items():
        monkeypatch.setattr(module, name, value)


_ENCODED: dict[str, tuple] = {}


def encoded(**options):
    """Encoded once, for whoever asks the same of as many prompts; nobody changes them."""
    key = f"{options} {module.MANY_PROMPTS} {module._nearest}"
    if key not in _ENCODED:
        emoji = open_family("emoji")
        config, plan = resolve(EraseConfig(device="cpu", **options), emoji)
        _ENCODED[key] = emoji, config, plan, encode_wordings(emoji, plan, 0, CPU, torch.float32, module.MANY_PROMPTS)
    return _ENCODED[key]


def test_what_erases_names_the_concept_and_what_holds_does_not(few):
    emoji, _, plan, made = encoded(concept="red apple")
    contexts = made.contexts[0]
    assert 20 <= len(contexts) <= 24 and made.plain == plan.concept_pairs
    assert all(names("red apple", p.prompt) and not names("red apple", p.neutral) and p.goal == p.neutral for p in contexts)
    assert len({p.prompt for p in contexts}) > 20, "in different contexts"
    assert not any(names("red apple", text) for text in made.held + made.listed)
    assert {"a red", "an apple" if "an apple" in made.rows else "a apple"} & {*made.held}, "a part of its name may stay"
    words = [c.text for c in made.candidates[0] if c.is_word]
    phrases = [c.text for c in made.candidates[0] if not c.is_word]
    assert (len(words), len(phrases)) == (4, 16) and all(4 <= len(c.pairs) <= 6 for c in made.candidates[0])
    assert all(candidate.text in pair.prompt for candidate in made.candidates[0] for pair in candidate.pairs)
    assert {*made.rows} >= {p.goal for c in made.candidates[0] for p in c.pairs}
    assert all(count <= most for count, most in emoji.token_counts([*made.rows])), "and the text encoder reads all of them"
    assert len(made.embeds["encoder_hidden_states"]) == len(made.rows)
    _ENCODED.clear()
    again = encoded(concept="red apple")[3]
    assert again.rows == made.rows and again.contexts == made.contexts


def test_what_is_near_is_looked_for_among_all_words_of_the_vocabulary_and_names(few, monkeypatch):
    monkeypatch.setattr(module, "MANY_PROMPTS", replace(FEW, near=32))
    emoji, _, _, made = encoded(concept="fox")
    rare = emoji.whole_words()[300:]
    assert "vixen" in rare and "a vixen" in [c.text for c in made.candidates[0] if c.is_word]
    near = {*made.held} & {*rare}
    assert 16 <= len(near) <= 32, "which are held, too"
    assert not near & {*made.words}, "but stand in no context"
    assert emoji.load_part("tokenizer").model_max_length == 24
    names_known = known_names(emoji)
    assert "Paris" in names_known and "Pablo Picasso" not in names_known, "which this tokenizer spells"


def test_a_mapped_concept_becomes_its_goal_and_one_that_is_erased_from_something_has_no_other_names(few):
    *_, made = encoded(concept="fox", map_to="owl")
    assert all(p.anchor and names("owl", p.goal) and not names("owl", p.neutral) for p in made.contexts[0])
    assert not any(names("owl", text) for text in made.held)
    *_, made = encoded(concept="ink", erase_from="fox")
    assert made.candidates == [[]] and all(names("fox", p.goal) for p in made.contexts[0])


def test_the_user_knows_better(few):
    *_, made = encoded(concept="fox", also_erase="sly red hunter", preserve="vixen")
    assert sum("a sly red hunter" in p.prompt for p in made.contexts[0]) == 24 // 8
    assert any(p.prompt == "a sly red hunter" for p in made.plain[0])
    assert not any(names("vixen", c.text) for c in made.candidates[0]) and "vixen" in made.given
    assert not any(names("sly red hunter", text) for text in made.held + made.listed)


CANDIDATES = {"fox": ["a vixen", "a dog", "a heart", "a sly"], "rose": ["a valentine", "a tulip", "a thorns"]}


@pytest.fixture
def some_candidates(monkeypatch):
    def nearest(encoder, concept, *_):
        encoder.add(CANDIDATES[concept])
        return CANDIDATES[concept]

    monkeypatch.setattr(module, "_nearest", nearest)


def test_the_teacher_knows_which_words_are_other_names(some_candidates, few, eager):
    emoji, config, _, made = encoded(concept=["fox", "rose"], rank=2)
    student = make_student(emoji, emoji.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    profiler = PhaseProfiler(CPU)
    training = AttentionTraining(Rollout(student, profiler), made, config.buffer, 1, 0, Monitor(student, profiler))
    training.run(None)
    fox, rose = training.verdicts
    assert [c.text for c in fox.same] == ["a vixen", "a sly"]
    assert [c.text for c in fox.others] == ["a dog", "a heart"]
    assert [c.text for c in rose.same] == ["a valentine", "a thorns"]
    assert [c.text for c in rose.others] == ["a tulip"], "though along one of its trajectories it looks like a rose"
    assert fox.nfe == 2 * (4 + 2 * 2), "what is nothing like it along the first is not looked at again"


def test_no_prompt_that_holds_has_another_name_in_it(some_candidates, few):
    _, _, _, made = encoded(concept="fox")
    vixen, *others = made.candidates[0]
    batches = Mixture(made, [Verdict([vixen], others)], 1, 1, torch.Generator().manual_seed(0))
    texts = {row: text for text, row in made.rows.items()}
    holding, erasing = ([texts[int(row)] for row in side[0].prompts] for side in (batches.holding, batches.erasing))
    assert "a vixen" in made.held and not any(names("vixen", text) for text in holding)
    assert any(names("vixen", text) for text in erasing) and "a dog" in holding


def test_what_is_another_name_for_one_concept_is_not_held_against_another(some_candidates, few):
    _, _, _, made = encoded(concept=["fox", "rose"])
    fox, rose = ({c.text: c for c in group} for group in made.candidates)
    candidates = replace(rose["a thorns"], text="a vixen"), replace(rose["a tulip"], text="a vixen tulip", is_word=False)
    verdicts = [Verdict([fox["a vixen"]], [fox["a dog"]]), Verdict([], [*candidates, rose["a tulip"]])]
    assert [c.text for c in mixture._held(verdicts)] == ["a dog", "a tulip"]
    assert [c.text for c in mixture._held(verdicts[1:])] == ["a vixen", "a vixen tulip", "a tulip"]


class Seen(Monitor):
    """What a monitor is shown."""

    def __init__(self, *given):
        super().__init__(*given)
        self.steps, self.losses = [], []

    def look(self, step):
        self.steps.append(step)

    def log(self, values, step):
        self.losses.append((step, values))


def test_a_step_learns_the_target_in_cross_attention_and_leaves_the_teacher_alone(few, eager):
    emoji, config, plan, made = encoded(concept="fox", rank=4)
    denoiser = emoji.load_denoiser(torch.float32)
    student = make_student(emoji, denoiser, config.student, CPU, torch.float32)
    rollout = Rollout(student, PhaseProfiler(CPU))
    table = make_table(plan, emoji.encode(plan.texts, CPU, torch.float32))
    inputs, times = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 700])
    rows = {name: value[torch.stack([table.neutrals[0], table.prompts[0]])] for name, value in table.embeds.items()}
    with torch.no_grad():
        null, named = emoji.predict(denoiser, inputs[:1].expand(2, -1, -1, -1), times[:1].expand(2), rows)
        frozen = {name: p.clone() for name, p in denoiser.named_parameters() if not p.requires_grad}
    seen = Seen(student, rollout.profiler)
    training = AttentionTraining(rollout, made, config.buffer, 60, 0, seen)
    training.run(None)
    losses, (verdict,) = training.losses, training.verdicts
    assert seen.steps == [*range(61)]
    assert seen.losses == [(50, {"attention_loss": losses[0]}), (60, {"attention_loss": losses[1]})]
    with torch.no_grad():
        with student.teacher():
            taught = emoji.predict(denoiser, inputs[:1].expand(2, -1, -1, -1), times[:1].expand(2), rows)
        after = emoji.predict(denoiser, inputs[:1].expand(2, -1, -1, -1), times[:1].expand(2), rows)
    assert torch.equal(taught, torch.stack([null, named]))
    assert all(torch.equal(p, frozen[name]) for name, p in denoiser.named_parameters() if not p.requires_grad)
    learns = {
        name.split(".transformer_blocks.0.")[1].split(".")[0] for name, p in denoiser.named_parameters() if p.requires_grad
    }
    assert learns == {"attn2", "ff"}
    assert (after[1] - null).norm() < 0.8 * (named - null).norm(), "the concept draws what its absence does"
    assert (after[0] - null).norm() < 0.3 * (named - null).norm(), "and its absence what it did"
    assert len(losses) == 2
    assert losses[-1] < losses[0]
    assert rollout.profiler.nfe == 12 * 10 * 2 + verdict.nfe
    assert 2 <= verdict.nfe / len(made.candidates[0]) < 6


def layer_loss(emoji, config, made, shown=(-1,)):
    """Of two layers with something learned, and a sample of hidden states for each of `shown`."""
    student = make_student(emoji, emoji.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters:
            parameter.normal_(std=0.05, generator=draws)
    blocks = emoji.cross_attention(student.denoiser)[:2]
    parts = {name: AttentionLayer(student.denoiser.get_submodule(name)) for name in blocks}
    hidden = {name: torch.randn(len(shown), 4, layer.width, generator=draws) for name, layer in parts.items()}
    return LayerLoss(student, parts, hidden, torch.tensor(shown), made, draws, config.training.unprompted_guidance)


@pytest.mark.parametrize("options", [{}, {"map_to": "owl", "negative_guidance": 0.3}], ids=str)
def test_the_loss_is_the_guided_target_of_every_layer(few, options):
    emoji, config, _, made = encoded(concept="fox", rank=2, **options)
    batch = next(Mixture(made, [], ERASE, HOLD, torch.Generator().manual_seed(0)))
    loss_of = layer_loss(emoji, config, made)
    student, parts = loss_of.student, loss_of.layers
    loss, expected = loss_of(batch), 0.0
    tokens = made.embeds["encoder_hidden_states"]
    for name, layer in parts.items():
        states = loss_of.hidden[name].expand(len(batch.prompts), -1, -1)
        out = layer(states, tokens[batch.prompts])
        with student.teacher():
            null, named, goal = (layer(states, tokens[rows]) for rows in (batch.neutrals, batch.prompts, batch.goals))
        size = (named - null)[:ERASE].square().mean()
        weight = torch.cat([batch.weight[:ERASE], HOLD_WEIGHT * batch.weight[ERASE:]]) / size
        expected += guided_mse_reference(out, torch.cat([null, named]), batch.eta, goal, weight) / len(parts)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(batch.prompts[ERASE:], batch.goals[ERASE:]), "what holds is its own goal"


def test_other_prompts_are_guided_away_where_the_concept_is_drawn(few):
    """And held as they are everywhere else."""
    emoji, config, _, made = encoded(concept=["fox", "rose"], rank=2, unprompted_guidance=3)
    batch = next(Mixture(made, [], ERASE, HOLD, torch.Generator().manual_seed(0)))
    loss_of = layer_loss(emoji, config, made, shown=(-1, 0, 1))
    student, draws = loss_of.student, torch.Generator()
    draws.set_state(loss_of.draws.get_state())
    loss, expected = loss_of(batch), 0.0
    samples = torch.randint(3, (len(batch.prompts),), generator=draws)
    held, tokens = torch.arange(len(batch.prompts)) >= ERASE, made.embeds["encoder_hidden_states"]
    assert all((held & (samples == kind)).any() for kind in range(3))
    for name, layer in loss_of.layers.items():
        states = loss_of.hidden[name][samples]
        out = layer(states, tokens[batch.prompts])
        with student.teacher():
            null, named = (layer(states, tokens[rows]) for rows in (batch.neutrals, batch.prompts))
            target = null - batch.eta.view(-1, 1, 1) * (named - null)
            for kind, concept in ((1, "fox"), (2, "rose")):
                here = held & (samples == kind)
                texts = ([concept] * int(here.sum()), [""] * int(here.sum()))
                shown, less = (layer(states[here], tokens[made.index(text)]) for text in texts)
                target[here] = named[here] - 3 * (shown - less)
        size = (named - null)[:ERASE].square().mean()
        weight = batch.weight * torch.where(held, HOLD_WEIGHT, 1.0) / size
        expected += (weight * (out - target).square().mean(dim=(1, 2))).mean() / len(loss_of.layers)
    torch.testing.assert_close(loss, expected)


def test_it_is_known_which_concept_a_sample_shows(few):
    emoji, config, _, made = encoded(concept=["fox", "rose"], rank=2, rollout_batch_size=4)
    student = make_student(emoji, emoji.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    block = emoji.cross_attention(student.denoiser)[0]
    watched = {block: AttentionLayer(student.denoiser.get_submodule(block))}
    rollout, states = Rollout(student, PhaseProfiler(CPU)), LayerStates(watched)
    options = config.buffer.replace(num_inference_steps=2)
    seen = survey(rollout, made, options, torch.Generator().manual_seed(0), states.watch)
    assert seen.own == 6 and len(states.parts) == 2, "the concepts' trajectories, then the others"
    given = states.parts[0][block].flatten(1)
    pairs = pairs_of_samples(torch.arange(6), 4, len(given))
    assert pairs.bincount().tolist() == [4] * 6
    assert seen.samples.pairs.bincount().tolist() == [2] * 12, "two steps"
    assert seen.concept_of(torch.arange(12)).tolist() == [0] * 3 + [1] * 3 + [-1] * 6
    # nothing has read the prompt before the first block: there a pair's two predictions are given the same
    twins = torch.cdist(given, given).fill_diagonal_(torch.inf).min(dim=1)
    assert twins.values.max() < 1e-3 * given.norm(dim=1).mean()
    assert torch.equal(pairs[twins.indices], pairs)


def test_a_loss_that_is_no_number_is_said(tmp_path, eager, monkeypatch):
    monkeypatch.setattr(attention, "LORA_RATE", float("inf"))
    given = SHORTEST | {"concept": "circle", "model": str(small_stable_diffusion(tmp_path / "model")), "attention_steps": 4}
    with pytest.raises(UserError, match="no longer a number at step 4 of --attention-steps; use --dtype float32"):
        erase(EraseConfig(output=tmp_path / "out", **given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sd", {"unprompted_guidance": 2.0}), ("sd", {"adapter_type": "none", "rank": None}), ("sd", {"scope": "esd-x-strict"}),
     ("sd", {"scope": "full"}), ("sdxl", {})],
)  # fmt: skip
def test_whole_runs_of_small_models(few, tmp_path, monkeypatch, eager, kind, options):
    monkeypatch.setattr(attention, "LOSS_EVERY", 2)
    path = tmp_path / "model"
    made = small_stable_diffusion(path) if kind == "sd" else save_family("sdxl", path)
    given = OF_LAYERS | {"attention_steps": 4} | options
    result = erase(EraseConfig(concept=["circle", "red"], model=str(made), output=tmp_path / "out", **given))
    buffer = resolve(EraseConfig(concept="red", **given), open_family(str(made)))[0].buffer
    assert 0 < result["nfe"] <= count_survey_nfe(buffer, 2, 2, module.MANY_PROMPTS)
    assert {*result["other_names"]} == {"circle", "red"} and result["training_samples"] == 0
    assert {"attention", "save"} <= {*result["seconds"]} and result["loss"]["last"] < 10
    assert json.loads((tmp_path / "out" / "result.json").read_text())["loss"] == result["loss"]
    base = open_family(str(made)).load_denoiser(torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    changed = {n for n, p in read_adapter(tmp_path / "out").apply(base).named_parameters() if not torch.equal(p, before[n])}
    learns = ["attn2"] if options.get("scope") == "esd-x-strict" else ["attn2", "ff"]
    assert {part for part in learns for name in changed if part in name.split(".")} == {*learns}
    assert all({*learns} & {*name.split(".")} for name in changed)


def test_training_goes_on_from_what_the_layers_learned(few, tmp_path, eager):
    made = small_stable_diffusion(tmp_path / "model")
    options = SHORTEST | {"concept": "circle", "model": str(made), "attention_steps": 2, "max_train_steps": 3}
    result = erase(EraseConfig(output=tmp_path / "out", learning_rate=1e-12, **options))
    assert result["training_samples"] > 0 and {"attention", "train"} <= {*result["seconds"]}
    layers = OF_LAYERS | {name: options[name] for name in ("concept", "model", "attention_steps")}
    alone = erase(EraseConfig(output=tmp_path / "alone", **layers))
    assert alone["training_samples"] == 0
    weights = [
        read_adapter(tmp_path / name).apply(open_family(str(made)).load_denoiser(torch.float32)) for name in ("out", "alone")
    ]
    for one, other in zip(*(w.parameters() for w in weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_models_without_such_layers_say_so(tmp_path):
    made = save_family("pixart", tmp_path / "model")
    with pytest.raises(UserError, match="--attention-steps needs cross-attention that nothing masks"):
        erase(EraseConfig(concept="circle", model=str(made), attention_steps=3, output=tmp_path / "out", device="cpu"))
    assert not (tmp_path / "out").exists()
