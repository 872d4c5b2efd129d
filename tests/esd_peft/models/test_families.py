"""Every kind against its own diffusers pipeline: trajectories, guided pairs, LoRA files and merged weights."""

import inspect
import json
import shutil

import diffusers
import pytest
import torch

from esd_peft import EraseConfig, MergeConfig, UserError, erase, merge_adapter
from esd_peft.erasure.defaults import resolve
from esd_peft.evaluation import validation
from esd_peft.models import flux, flux_2, offload, open_family
from esd_peft.models.sampling import encode_prompts
from esd_peft.options.model import DrawingOptions
from esd_peft.prompts.plan import Pair, PromptPlan
from esd_peft.prompts.table import make_table
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import make_student
from families import MAKERS, draw_small, save_family
from runs import few_prompts, few_steps

CPU, STEPS, CONCEPT = torch.device("cpu"), 4, "a picture of circle"


@pytest.fixture(scope="session", params=MAKERS)
def kind(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp("families") / "model")


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    draw_small(monkeypatch)


def plain_pipeline(path):
    index = json.loads((path / "model_index.json").read_text())
    absent = {name: None for name, part in index.items() if part == [None, None]}  # diffusers wants to hear it again
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe, getattr(pipe, "unet", None) or pipe.transformer


def roll(path, monkeypatch, scale):
    """Our trajectory: the noise it starts from and the generator after it, latents after each step, its samples."""
    family = open_family(str(path))
    plan = PromptPlan([CONCEPT], [[Pair(CONCEPT, "")]], [], [])
    table = make_table(plan, family.encode(plan.texts, CPU, torch.float32))
    denoiser = family.load_denoiser(torch.float32)
    options = {"num_inference_steps": STEPS, "guidance_scale": scale, "rollout": "teacher", "device": "cpu"}
    config, _ = resolve(EraseConfig(concept="circle", model=str(path), **options), family)
    student = make_student(family, denoiser, config.student, CPU, torch.float32)  # which changes nothing yet
    noise, latents, generator, states = [], [], torch.Generator().manual_seed(0), []
    set_timesteps, step = family.set_timesteps, family.scheduler_step

    def noted_start(start, *args):
        noise.append(start)
        states.append(generator.get_state())
        return set_timesteps(start, *args)

    def noted_step(*args):
        latents.append(step(*args))
        return latents[-1]

    monkeypatch.setattr(family, "set_timesteps", noted_start)
    monkeypatch.setattr(family, "scheduler_step", noted_step)
    rollout = Rollout(student, PhaseProfiler(CPU))
    buffer = rollout.collect(table, torch.tensor([0]), config.buffer, generator, progress=False)
    return noise[0], torch.Generator().set_state(states[0]), latents, buffer, table, family, denoiser


def told(pipe, scale):
    """How each pipeline is told of classifier-free guidance, in whose scale 1 is none, and of the size."""
    side = 8 * getattr(pipe, "vae_scale_factor", 8)
    small = {"height": side, "width": side}
    return {
        "ChromaPipeline": small | {"guidance_scale": scale, "negative_prompt": ""},
        "FluxPipeline": small | {"true_cfg_scale": scale, "negative_prompt": "", "guidance_scale": flux.EMBEDDED_GUIDANCE},
        "Flux2Pipeline": small | {"guidance_scale": flux_2.EMBEDDED_GUIDANCE},
        "Flux2KleinPipeline": small | {"guidance_scale": scale},
        "QwenImagePipeline": small | {"true_cfg_scale": scale, "negative_prompt": ""},
        "WanPipeline": small | {"guidance_scale": scale, "num_frames": 1},
        "ZImagePipeline": small | {"guidance_scale": scale - 1},
    }.get(type(pipe).__name__, {"guidance_scale": scale})


def answer(out):
    """A denoiser's, as its pipeline takes it."""
    made = out[0] if isinstance(out, tuple) else out.sample
    return -torch.stack(made).squeeze(2) if isinstance(made, list) else made


def draw(pipe, denoiser, noise, generator, scale):
    """The pipeline's own run from that noise: latents after each step, and at each the answers to "" and to the concept."""
    latents, answers = [], []
    denoiser.register_forward_hook(lambda module, args, out: answers.append(answer(out)))
    if "Flux2" in type(pipe).__name__:  # it packs them itself
        noise = noise.mT.unflatten(2, (4, 4))
    options = {"num_inference_steps": STEPS, "latents": noise.clone(), "generator": generator, "output_type": "latent"}
    if isinstance(pipe, diffusers.PixArtSigmaPipeline):
        options["callback"] = lambda i, t, now: latents.append(now)
    else:
        options["callback_on_step_end"] = lambda pipe, i, t, values: latents.append(values["latents"]) or values
    with torch.no_grad():
        pipe(prompt=CONCEPT, **options, **told(pipe, scale))
    if scale == 1.0:  # without guidance the pipeline asks for the concept alone
        return latents, [(None, answer) for answer in answers]
    if len(answers) == 2 * STEPS:  # one after the other
        return latents, [*zip(answers[1::2], answers[0::2], strict=True)]
    concept_first = isinstance(pipe, diffusers.ZImagePipeline)
    return latents, [made.chunk(2)[:: -1 if concept_first else 1] for made in answers]


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_trajectories_and_pairs_are_the_pipelines_own(kind, monkeypatch, scale):
    noise, generator, ours, buffer, *_ = roll(kind, monkeypatch, scale)
    pipe, denoiser = plain_pipeline(kind)
    if scale > 1.0 and isinstance(pipe, diffusers.Flux2Pipeline):
        pytest.skip("this pipeline knows no negative prompt")
    latents, pairs = draw(pipe, denoiser, noise, generator, scale)
    assert len(ours) == STEPS - 1  # the last step would lead to the image, where there is nothing to learn
    for mine, theirs in zip(ours, latents, strict=False):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    channels = buffer.inputs.shape[1]
    for i, (null, concept) in enumerate(pairs):
        for mine, theirs in ((buffer.teacher[0, i], null), (buffer.teacher[1, i], concept)):
            if theirs is not None:
                theirs = theirs[0] if mine.dim() == 2 else theirs[0, :channels]  # PixArt's other half is the variance
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert (buffer.teacher[0] - buffer.teacher[1]).abs().max() > 1e-3


def test_adapter_and_merged_weights_in_plain_diffusers(kind, tmp_path, monkeypatch):
    erased, merged = tmp_path / "erased", tmp_path / "merged"
    quick = {
        "num_inference_steps": 2,
        "trajectories": 2,
        "max_train_steps": 4,
        "learning_rate": 0.03,
        "num_validation_images": 0,
        "device": "cpu",
    }
    erase(EraseConfig(concept="circle", model=str(kind), output=erased, **quick))
    merge_adapter(MergeConfig(adapter=[erased], output=merged))

    noise, *_, table, family, base = roll(kind, monkeypatch, 1.0)
    latents, timesteps = noise.expand(2, *noise.shape[1:]), torch.tensor([500, 500])

    @torch.no_grad()
    def predict(denoiser):
        return family.predict(denoiser, latents, timesteps, table.embeds)

    sizes, (_, changed) = [], plain_pipeline(merged)
    for layer in changed.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, args, out: sizes.append(out.abs().max().item()))
    plain, seen = predict(base), predict(changed)
    assert (seen - plain).abs().max() > 1e-3
    pipe, denoiser = plain_pipeline(kind)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(erased)
    else:
        import peft

        peft.PeftModel.from_pretrained(denoiser, erased)
    # Merged weights are rounded to fp32, which moves keys and values by about 2⁻²⁴ of their size. Training brings those of
    # this random Sana to 1000, so that each of its blocks adds 6e-5.
    rounding = 8 * 2**-24 * max(sizes)
    torch.testing.assert_close(predict(denoiser), seen, atol=max(1e-4, rounding), rtol=1e-3)


# the others differ from one of these in their scheduler, or in what they are told beside the prompt
ARCHITECTURES = ["sdxl", "sd3", "flux dev", "pixart", "sana", "z-image", "flux.2 klein", "qwen-image", "chroma", "wan"]


@pytest.mark.parametrize("smaller", [False, True])
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "wan 2.2 ti2v", "flux.2 dev"], indirect=True)
def test_images_of_one_batch_are_those_of_the_pipelines_own_calls(kind, smaller):
    family = open_family(str(kind))
    told_too = {}
    if smaller:
        options = DrawingOptions(resolution=4 * family.vae_factor, max_sequence_length=48 if family.prompt_length else None)
        family.draw_at(options)
        fewer = {"max_sequence_length": 48, "use_resolution_binning": False}
        takes = inspect.signature(family.pipeline_class.__call__).parameters
        told_too = {name: value for name, value in fewer.items() if name in takes}
    prompts, settings = ["a circle", "a picture of circle in the red square style"], {"num_inference_steps": 2}
    encoded = encode_prompts(family, prompts, CPU, torch.float32)
    ours = family.pipeline(family.load_denoiser(torch.float32), CPU, torch.float32)
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    mine = family.draw(ours, **encoded.arguments([0, 1]) | settings, generator=noise)
    pipe, _ = plain_pipeline(kind)
    assert not smaller or mine.shape[2:] == (4 * family.vae_factor,) * 2
    size = dict(zip(("height", "width"), mine.shape[2:], strict=True))
    for i, prompt in enumerate(prompts):
        given = told(pipe, family.guidance_scale) | size | settings | told_too
        theirs = family.draw(pipe, prompt=prompt, **given, generator=torch.Generator().manual_seed(i))
        torch.testing.assert_close(mine[i], theirs[0], atol=1e-4, rtol=1e-4)
    assert (mine[0] - mine[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "flux.2 dev"], indirect=True)
def test_the_denoiser_is_told_what_the_pipeline_tells_it_in_half_precision(kind):
    family, half = open_family(str(kind)), torch.bfloat16
    encoded, denoiser = encode_prompts(family, [CONCEPT], CPU, half), family.load_denoiser(half)
    pipe, calls = family.pipeline(denoiser, CPU, half), []
    hook = denoiser.register_forward_hook(
        lambda _, args, more, out: calls.append((args, more, answer(out))), with_kwargs=True
    )
    alone = {} if denoiser.config.get("guidance_embeds") else family.pipeline_guidance(1.0)  # the prompt without ""
    arguments = encoded.arguments([0]) | alone | {"num_inference_steps": 8}
    family.draw(pipe, **arguments, generator=torch.Generator().manual_seed(0))
    hook.remove()
    embeds = {name: value[:1] for name, value in encoded.embeds.items()}
    for (args, more, theirs), timestep in zip(calls, pipe.scheduler.timesteps, strict=True):
        inputs = args[0] if args else more["hidden_states"]
        inputs = torch.stack(inputs).squeeze(2) if isinstance(inputs, list) else inputs
        with torch.no_grad():
            mine = family.predict(denoiser, inputs, timestep.expand(1), embeds)
        assert torch.equal(mine, theirs[:, : mine.shape[1]])


@pytest.mark.parametrize("kind", ARCHITECTURES, indirect=True)
def test_gradient_checkpointing_changes_no_prediction(kind):
    family = open_family(str(kind))
    embeds, denoiser = family.encode([CONCEPT, ""], CPU, torch.float32), family.load_denoiser(torch.float32)
    noise = family.initial_latents(2, denoiser, torch.Generator().manual_seed(0))
    timesteps, made = torch.tensor([500, 500]), []
    denoiser.requires_grad_().train()
    for recompute in (False, True):
        if recompute:
            denoiser.enable_gradient_checkpointing()
        prediction = family.predict(denoiser, noise, timesteps, embeds)
        made.append([prediction, *torch.autograd.grad(prediction.square().mean(), denoiser.parameters(), allow_unused=True)])
    torch.testing.assert_close(*made)


@pytest.mark.parametrize("kind", ARCHITECTURES, indirect=True)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_half_precision_and_little_memory(kind, tmp_path, quantize, monkeypatch):
    monkeypatch.setattr(validation, "UNRELATED", validation.UNRELATED[:1])
    few_prompts(monkeypatch.setattr)
    few_steps(monkeypatch.setattr)
    options = {
        "num_inference_steps": 2,
        "trajectories": 2,
        "max_train_steps": 2,
        "num_validation_images": 1,
        "device": "cpu",
    }
    options |= {"dtype": "bfloat16", "gradient_checkpointing": True, "quantize": quantize, "per_device_batch_size": 3}
    result = erase(EraseConfig(concept="circle", model=str(kind), output=tmp_path / "erased", **options))
    assert result["loss"]["last"] < 10
    assert (tmp_path / "erased" / "before_after.png").is_file()


@pytest.mark.parametrize("whole", [True, False])
def test_a_wan_of_two_transformers_is_refused(whole, tmp_path):
    model = save_family("wan", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text()) | {"boundary_ratio": None if whole else 0.875}
    if whole:  # else the second is not among the files, though the pipeline gives way to it
        shutil.copytree(model / "transformer", model / "transformer_2")
        index["transformer_2"] = index["transformer"]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"--model .* has two transformers, .* name a Wan that has one"):
        open_family(str(model))


@pytest.mark.parametrize("name", ["sd3", "flux dev", "pixart", "sana", "z-image"])
def test_large_text_encoders_give_the_same_embeddings_layer_by_layer(name, tmp_path, monkeypatch):
    family = open_family(str(save_family(name, tmp_path / "model")))
    cpu, prompts = torch.device("cpu"), ["a circle", "", "a red square"]
    plain = family.encode(prompts, cpu, torch.float32)
    monkeypatch.setattr(offload, "LARGE", 0)
    pipe = family.assemble(family.text_parts, torch.float32)
    there = offload.encoder_bytes(pipe)
    whole = sum(
        p.numel() * p.element_size()
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    )
    offload.bring_encoders(pipe, cpu)
    encoders = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    stays = sum(p.numel() * p.element_size() for part in encoders for p in part.parameters() if not p.is_meta)
    assert stays < there < 0.8 * whole  # on the device between layers, and with the largest of these
    with torch.no_grad():
        streamed = family.encode_many(pipe, prompts, cpu, cpu)
    assert all(torch.equal(streamed[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", ["z-image", "flux.2 klein", "flux.2 dev", "qwen-image", "flux dev"])
def test_a_prompt_is_counted_as_the_text_encoder_is_told_it(name, tmp_path):
    family = open_family(str(save_family(name, tmp_path / "model")))
    pipe = family.load_encoders(CPU, torch.float32)
    told, tokenizer = [], family._reader
    part = "text_encoder_2" if name == "flux dev" else "text_encoder"
    getattr(pipe, part).register_forward_pre_hook(
        lambda module, args, more: told.append(more.get("input_ids", args[0] if args else None)), with_kwargs=True
    )
    family.encode_prompts(pipe, [CONCEPT], CPU)
    (count, most), pad = family.token_counts([CONCEPT])[0], tokenizer.pad_token_id
    dropped = 0
    if name == "qwen-image":  # of the real tokenizer these are the tokens that the pipeline leaves out
        dropped = len(tokenizer(pipe.prompt_template_encode.partition("{}")[0]).input_ids)
    assert (told[0] != pad).sum() - dropped == count < most
    assert family.template_length == (0 if name == "flux dev" else family.token_counts([""])[0][0])
    family.draw_at(DrawingOptions(max_sequence_length=8))
    if name != "flux dev":  # which has no template
        with pytest.raises(
            UserError, match=r"--concept '.*' is \d+ tokens long and the text encoder reads 8,.*raise --max-sequence-length"
        ):
            family.check_lengths({"--concept": [CONCEPT]})


def test_a_size_between_patches_is_refused(tmp_path):
    family = open_family(str(save_family("sd3", tmp_path / "model")))
    with pytest.raises(UserError, match=r"--resolution 30 is no multiple of 4; use 32"):
        family.draw_at(DrawingOptions(resolution=30))
    with pytest.raises(UserError, match=r"--resolution 64 is more than this model has positions for; use 32"):
        family.draw_at(DrawingOptions(resolution=64))
    family = open_family(str(save_family("sd3 without T5", tmp_path / "short")))
    with pytest.raises(UserError, match=r"--max-sequence-length is for T5 and language models, .*; leave it out"):
        family.draw_at(DrawingOptions(max_sequence_length=16))
    family = open_family(str(save_family("sana", tmp_path / "sana")))
    family.draw_at(DrawingOptions(resolution=96))  # whose patch is one latent
    assert family.latent_size(family.empty_denoiser()) == (3, 3)
