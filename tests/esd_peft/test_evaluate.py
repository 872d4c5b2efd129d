"""The evaluation from end to end: on the embedded pipeline, and on a small random one with small random detectors."""

import csv
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image

import commands
import esd_peft
from detectors import small_classifier, small_clip
from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, UserError, erase, evaluate, merge_adapter
from esd_peft.adapters.saved import read_adapter
from esd_peft.errors import UnusableImages
from esd_peft.evaluate import command_of
from esd_peft.evaluation import suites
from esd_peft.evaluation.comparison import Model, open_models
from esd_peft.models import FAMILIES, open_family
from esd_peft.models.stable_diffusion import StableDiffusion
from esd_peft.options.command_line import parse
from esd_peft.worlds import WORLDS
from families import draw_small, save_family
from runs import SHORTEST

EMBEDDED = WORLDS["shapes"].pipeline
QUICK = SHORTEST | {"max_train_steps": 2}
FAST = {"num_inference_steps": 2, "seeds": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def adapter(small_sd, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "erased"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=output, learning_rate=0.3, **QUICK))
    return output


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return small_classifier(root / "resnet", ["circle, disc", "star"]), small_clip(root / "clip")


def prompts_file(
    path, rows=(("a red circle", "circle"), ("a circle", "circle"), ("a star", "star"), ("a blue star", "star"))
):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "label"), *rows])
    return str(path)


def times(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*.png")}


@pytest.mark.parametrize(
    "record", [{"concept": 3}, {"configs": {"a": 1}}, {"configs": [1]}, {"concept": [None]}, [1]], ids=str
)
def test_a_record_of_other_types_is_one_sentence(small_sd, tmp_path, record):
    merged = shutil.copytree(small_sd, tmp_path / "merged")
    (merged / "erased.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"--erased: .*erased.json is damaged"):
        evaluate(EvaluateConfig(erased=merged, output=tmp_path / "out", **FAST))


def test_an_adapter_that_does_not_fit_is_said_before_the_images(adapter, tmp_path):
    with pytest.raises(UserError, match=r"--erased .* does not fit the base"):
        evaluate(EvaluateConfig(erased=adapter, base=str(EMBEDDED), output=tmp_path / "out", **FAST))
    assert not list(tmp_path.iterdir())


def test_every_part_on_a_pipeline_of_ones_own(adapter, models, tmp_path):
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * i, 10, 10)).save(tmp_path / "real" / f"{i}.png")
    config = EvaluateConfig(
        erased=adapter, suite="csv", prompts=prompts_file(tmp_path / "p.csv"), output=tmp_path / "out", batch_size=3,
        detector=str(models[0]), clip=str(models[1]), features=str(models[1]), reference=tmp_path / "real", **FAST,
    )  # fmt: skip
    result = evaluate(config)
    assert result.concepts == ["circle"] and result.detector.name == str(models[0])
    assert result.accuracies.targets["circle"].after.count == 4
    assert result.accuracies.others["label"]["star"].before.count == 4
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found == json.loads(json.dumps(result.to_dict()))
    assert set(found["measures"]) == {"CLIP score", "Pixel distance", "FID and KID"}
    assert set(found["measures"]["FID and KID"]["scores"]) == {"FID", "KID"}
    distances = found["measures"]["Pixel distance"]["scores"]
    assert distances["concept prompts"]["distance"]["mean"] > 0.001
    assert set(distances) == {"concept prompts", "other prompts"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a blue star" in page and page.count("data:image/webp") == 4 * 2 * 2
    assert len(times(tmp_path / "out")) == 2 * 8

    before = times(tmp_path / "out")
    again = evaluate(config)
    assert times(tmp_path / "out") == before
    assert dataclasses.replace(again, seconds={}) == dataclasses.replace(result, seconds={})
    (tmp_path / "out" / "images" / "after" / "00002_001.png").unlink()
    evaluate(config)
    changed = {path.name for path, time in times(tmp_path / "out").items() if before[path] != time}
    assert changed == {"00002_001.png"}
    with pytest.raises(UserError, match=r"--output holds .*--overwrite"):
        evaluate(config.replace(seed=1))
    assert times(tmp_path / "out").keys() == before.keys()


def test_images_of_another_adapter_config_are_not_taken_for_its_own(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "erased")
    options = {"suite": "csv", "prompts": prompts_file(tmp_path / "p.csv"), "output": tmp_path / "out", **FAST}
    evaluate(EvaluateConfig(erased=copy, **options))
    settings, known = (json.loads((copy / name).read_text()) for name in ("adapter_config.json", "base.json"))
    (copy / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 4 * settings["lora_alpha"]}))
    (copy / "base.json").write_text(json.dumps({key: value for key, value in known.items() if key != "files"}))
    with pytest.raises(UserError, match=r"holds .*after, made by another model"):
        evaluate(EvaluateConfig(erased=copy, **options))
    evaluate(EvaluateConfig(erased=copy, overwrite=True, **options))
    (tmp_path / "out" / "images" / "after" / "mine.png").write_text("precious")
    with pytest.raises(UserError, match=r"holds mine.png, which esd_peft did not write"):
        evaluate(EvaluateConfig(erased=copy, overwrite=True, seed=1, **options))
    assert (tmp_path / "out" / "images" / "after" / "mine.png").is_file()


@pytest.mark.parametrize("option", ["reference", "attack_reference"])
def test_images_that_cannot_be_read_are_noticed_before_others_are_made(adapter, models, tmp_path, option):
    (tmp_path / "real").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "real" / "1.png").write_bytes((tmp_path / "real" / "1.png").read_bytes()[:-30])
    more = {"attack": ["textual-inversion"]} if option == "attack_reference" else {"features": str(models[1])}
    source = prompts_file(tmp_path / "p.csv")
    config = EvaluateConfig(erased=adapter, suite="csv", prompts=source, detector=str(models[0]), output=tmp_path / "out",
                            **more, **{option: tmp_path / "real"}, **FAST)  # fmt: skip
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} .*1.png cannot be read as an image"):
        evaluate(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["base/unet/config.json", "base/tokenizer/merges.txt", "base/model_index.json",
    "base/scheduler/scheduler_config.json", "base/vae/diffusion_pytorch_model.safetensors", "erased/adapter_config.json",
    "erased/adapter_model.safetensors", "base/tokenizer/added_tokens.json"])  # fmt: skip
def test_a_model_is_told_by_all_of_its_files(adapter, small_sd, tmp_path, file):
    base, copy = shutil.copytree(small_sd, tmp_path / "base"), shutil.copytree(adapter, tmp_path / "erased")
    family, opened = open_family(str(base)), read_adapter(copy)
    before = Model(family, opened).fingerprint()
    with (tmp_path / file).open("ab") as changed:
        changed.write(b" ")
    assert Model(family, opened).fingerprint() != before
    assert (Model(family).fingerprint() != Model(open_family(str(small_sd))).fingerprint()) == file.startswith("base")


def test_a_merged_pipeline_says_what_was_erased_and_shows_what_the_adapter_shows(adapter, small_sd, tmp_path):
    merge_adapter(MergeConfig(adapter=adapter, output=tmp_path / "merged"))
    source = prompts_file(tmp_path / "p.csv")
    options = {"suite": "csv", "prompts": source, **FAST}
    with pytest.raises(UserError, match="made from a directory sd; name where it is"):
        evaluate(EvaluateConfig(erased=tmp_path / "merged", output=tmp_path / "a", **options))
    merged = evaluate(EvaluateConfig(base=str(small_sd), erased=tmp_path / "merged", output=tmp_path / "a", **options))
    with_adapter = evaluate(EvaluateConfig(erased=adapter, output=tmp_path / "b", **options))
    assert merged.concepts == with_adapter.concepts == ["circle"] and merged.accuracies is None
    for path in sorted((tmp_path / "a" / "images").rglob("*.png")):
        one, other = Image.open(path), Image.open(tmp_path / "b" / path.relative_to(tmp_path / "a"))
        assert max(abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)) <= 3  # rounding to fp16


def test_images_do_not_depend_on_how_many_prompts_are_encoded_together(adapter, tmp_path, monkeypatch):
    options = {"erased": adapter, "suite": "csv", "prompts": prompts_file(tmp_path / "p.csv"), **FAST}
    evaluate(EvaluateConfig(output=tmp_path / "a", **options))
    monkeypatch.setattr(sys.modules["esd_peft.evaluate"], "PROMPTS_AT_A_TIME", 3)
    evaluate(EvaluateConfig(output=tmp_path / "b", **options))
    for path in sorted((tmp_path / "a" / "images").rglob("*.png")):
        one, other = Image.open(path), Image.open(tmp_path / "b" / path.relative_to(tmp_path / "a"))
        assert max(abs(x - y) for x, y in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_the_suite_of_the_concept_itself(adapter, tmp_path):
    result = evaluate(
        EvaluateConfig(erased=adapter, output=tmp_path / "out", limit=3, dtype="bfloat16", **FAST | {"seeds": 1})
    )
    assert result.suite == "concept" and result.prompts == 6 and result.detector is None
    assert [verdict.level for verdict in result.verdicts] == ["unknown", "unknown"]
    assert "look at them" in (tmp_path / "out" / "report.md").read_text()


KINDS = ["sdxl", "sd3", "flux dev", "pixart", "sana", "z-image", "qwen-image", "chroma", "flux.2 klein", "flux.2 dev", "wan"]


def test_every_family_is_among_these(tmp_path):
    tried = {type(open_family(str(save_family(kind, tmp_path / kind)))) for kind in KINDS}
    assert tried | {StableDiffusion} == {*FAMILIES}, "most of the other tests are of Stable Diffusion 1.x"


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind, tmp_path, monkeypatch):
    draw_small(monkeypatch)
    model = save_family(kind, tmp_path / "model")
    erase(EraseConfig(concept="circle", model=str(model), output=tmp_path / "erased", learning_rate=0.3, **QUICK))
    source = prompts_file(tmp_path / "p.csv", [("a circle", ""), ("a square", "")])
    options = FAST | {"seeds": 1}
    result = evaluate(
        EvaluateConfig(erased=tmp_path / "erased", suite="csv", prompts=source, output=tmp_path / "out", **options)
    )
    (measure,) = result.measures
    assert all(0 < scores["distance"].mean < 1 for scores in measure.scores.values())


def test_quantized_models(small_sd, adapter, tmp_path):
    source = prompts_file(tmp_path / "p.csv")
    options = {"erased": adapter, "suite": "csv", "prompts": source, "quantize": "nf4", **FAST}
    result = evaluate(EvaluateConfig(output=tmp_path / "out", **options))
    assert result.measures[0].scores["concept prompts"]["distance"].mean > 0
    weights = tmp_path / "weights"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=weights, adapter_type="none", **QUICK | {"rank": None}))
    with pytest.raises(UserError, match=r"--quantize nf4 does not work with the whole weights"):
        evaluate(EvaluateConfig(output=tmp_path / "other", **options | {"erased": weights}))


def drawing(monkeypatch, images):
    """Let pipelines draw what `images` makes of the images that they draw."""
    draw = StableDiffusion.draw
    monkeypatch.setattr(StableDiffusion, "draw", lambda self, pipe, **said: images(draw(self, pipe, **said)))


def not_numbers(images):
    return images * torch.nan


def one_colour(images):
    return torch.full_like(images, 0.5)


@pytest.mark.parametrize("shown", [not_numbers, one_colour])
@pytest.mark.parametrize("half", ["before", "after"])
def test_no_verdict_comes_from_images_that_show_nothing(half, shown, adapter, models, tmp_path, monkeypatch):
    options = {"erased": adapter, "suite": "csv", "prompts": prompts_file(tmp_path / "p.csv"), "detector": str(models[0])}
    config = EvaluateConfig(output=tmp_path / "out", **options, **FAST)
    drawn = itertools.count()
    with monkeypatch.context() as patch:
        first = 0 if half == "before" else 1  # each half is one batch
        drawing(patch, lambda images: shown(images) if next(drawn) >= first else images)
        with pytest.raises(UnusableImages, match=rf"images \({half}\) are .* no verdict"):
            evaluate(config)
    assert not (tmp_path / "out" / "result.json").exists() and next(drawn) == first + 1, "the other half is not drawn"
    if shown is one_colour:  # they are in the cache now, which says no more than before
        with pytest.raises(UnusableImages, match=rf"images \({half}\) are each of one colour"):
            evaluate(config)
        path = tmp_path / "out" / "images" / half / "00002_001.png"
        noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
        assert evaluate(config).verdicts, "some images of one colour may be"


def test_a_finished_adapter_is_kept_where_its_images_show_nothing(small_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "RETAINED", 2)
    output = tmp_path / "out"
    options = QUICK | {"num_validation_images": 1}
    drawing(monkeypatch, lambda images: not_numbers(images) if output.exists() else images)
    with pytest.raises(UserError, match=r"the adapter in .*out is finished, but images \(.*\) are NaN .*esd_peft.evaluate"):
        erase(EraseConfig(concept="circle", model=str(small_sd), output=output, **options))
    assert read_adapter(output).concepts == ["circle"] and not (output / "before_after.png").exists()
    record = merge_adapter(MergeConfig(adapter=output, output=tmp_path / "merged"))
    assert record["concept"] == ["circle"]


def test_a_base_that_draws_nothing_is_said_before_it_is_trained(small_sd, tmp_path, monkeypatch):
    drawing(monkeypatch, one_colour)
    options = {"concept": "circle", "model": str(small_sd), "output": tmp_path / "out"}
    with pytest.raises(UnusableImages, match=r"images \(before\) .* add --num-validation-images 0"):
        erase(EraseConfig(**options, **QUICK | {"num_validation_images": 1}))
    assert not (tmp_path / "out").exists()
    assert erase(EraseConfig(**options, **QUICK))["concepts"] == {}


def compared(erased, model, **options):
    return open_models(EvaluateConfig(erased=erased, base=str(model), device="cpu", **options))


def test_images_are_drawn_as_the_erasure_was_trained_and_what_is_otherwise_is_said(tmp_path):
    """SD3 attends to padding, so that prompts of another length draw something else."""
    model, erased, merged = save_family("sd3", tmp_path / "sd3"), tmp_path / "erased", tmp_path / "merged"
    usual, (size, _) = open_family(str(model)).prompt_length, open_family(str(model)).image_size(sd3 := denoiser_of(model))
    half = size // 2
    options = {"max_sequence_length": 32, "resolution": half}
    erase(EraseConfig(concept="circle", model=str(model), output=erased, **QUICK, **options))
    merge_adapter(MergeConfig(adapter=erased, output=merged))
    for path in (erased, merged):
        taken = compared(path, model)
        for family in (taken.base.family, taken.erased.family):
            assert family.prompt_length == 32 and family.image_size(sd3) == (half, half)
        assert taken.drawing.drawing() == options
        assert [re.search("with (--.*), and so", note)[1] for note in taken.notes] == [
            f"--resolution {half}", "--max-sequence-length 32",
        ]  # fmt: skip
        other = compared(path, model, max_sequence_length=usual, resolution=half)
        assert other.erased.family.prompt_length == usual
        assert [f"--max-sequence-length 32; these images, with {usual}," in note for note in other.notes] == [True]
        assert compared(path, model, **options).notes == []


def denoiser_of(model):
    return open_family(str(model)).empty_denoiser()


def test_an_erasure_at_the_models_own_size_says_so_at_another(tmp_path):
    model, erased = save_family("sd3", tmp_path / "sd3"), tmp_path / "erased"
    size, _ = open_family(str(model)).image_size(denoiser_of(model))
    erase(EraseConfig(concept="circle", model=str(model), output=erased, **QUICK))
    assert compared(erased, model).notes == [] == compared(erased, model, resolution=size).notes
    (note,) = compared(erased, model, resolution=size // 2).notes
    assert f"--resolution {size}; these images, with {size // 2}," in note


def test_adapters_that_were_trained_otherwise_are_said_and_none_is_followed(small_sd, tmp_path):
    merged = shutil.copytree(small_sd, tmp_path / "merged")
    size, _ = open_family(str(small_sd)).image_size(denoiser_of(small_sd))
    groups = [{"pretrained": {"model": "sd", "resolution": n}} for n in (size, size // 2)]
    (merged / "erased.json").write_text(json.dumps({"concept": ["circle"], "configs": groups}))
    found = compared(merged, small_sd)
    assert found.drawing.drawing() == {} and f"--resolution {size // 2}; these images, with {size}," in found.notes[0]
    for wrong in ("large", [64], 10**9, -1):
        configs = [{"pretrained": {"model": "sd", "resolution": wrong}}]
        (merged / "erased.json").write_text(json.dumps({"concept": ["circle"], "configs": configs}))
        with pytest.raises(UserError, match=r"--erased .*--resolution.*restore its files"):
            compared(merged, small_sd)


def test_the_embedded_pipeline(tmp_path):
    """Few prompts and few steps: what the default erasure reaches is tested in test_promise.py."""
    options = QUICK | {"num_inference_steps": 10, "trajectories": 8, "max_train_steps": 20, "rank": 8}
    erase(EraseConfig(concept="circle", output=tmp_path / "erased", **options))
    config = EvaluateConfig(
        erased=tmp_path / "erased", output=tmp_path / "out", limit=18, seeds=1, num_inference_steps=12, device="cpu"
    )
    result = evaluate(config)
    assert result.suite == "shapes"
    target, kept = result.accuracies.targets["circle"], result.accuracies.others_total
    assert target.before.share >= 0.8 and target.after.share <= 0.4
    assert kept.before.share >= 0.9 and kept.lost <= 0.05
    assert result.accuracies.target_domains == {"shape"} and result.accuracies.cross_domain.after.count > 0
    assert "circle" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_that_is_recorded_asks_for_the_same(tmp_path):
    config = EvaluateConfig(erased="a b", concept=["x", "y"], lpips=True, seeds=3, suite="concept", output=tmp_path)
    words = shlex.split(command_of(config))
    assert words[:3] == ["python", "-m", "esd_peft.evaluate"]
    assert parse(EvaluateConfig, "evaluate", words[3:]) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"erased": "/nowhere"}, "--erased /nowhere is not an adapter directory"),
        ({"suite": "everything"}, "--suite everything"),
        ({"suite": "csv"}, "--prompts"),
        ({"suite": "concept", "concept": " "}, "--concept"),
        ({"suite": "concept", "detector": "x"}, "--detector is of no use"),
        ({"reference": "/nowhere"}, "--reference and --features need each other"),
        ({"reference": "/nowhere", "features": "{clip}"}, "--reference /nowhere is no folder"),
        ({"clip": "/no/such/model"}, "--clip /no/such/model cannot be loaded"),
        ({"suite": "imagenette", "concept": "tench", "detector": "/no/such/model"}, "--detector /no/such/model"),
        ({"base": "/nowhere"}, "--base /nowhere"),
        ({"output": "{adapter}"}, "--output .* is or holds"),
    ],
    ids=str,
)
def test_input_that_cannot_work(adapter, models, tmp_path, options, says):
    names = {"clip": models[1], "adapter": adapter}
    options = {k: v.format(**names) for k, v in options.items()}
    values = {"erased": adapter, "output": tmp_path / "out", "limit": 1, **FAST} | options
    with pytest.raises(UserError, match=says) as error:
        evaluate(EvaluateConfig(**values))
    assert "\n" not in str(error.value)
    assert (adapter / "adapter_config.json").is_file()


def test_the_embedded_classifier_is_not_asked_about_other_pipelines(adapter, small_sd, tmp_path):
    base = shutil.copytree(small_sd, tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    with pytest.raises(UserError, match=r"--suite shapes is for the embedded pipeline, not for .*base"):
        evaluate(EvaluateConfig(erased=adapter, base=str(base), suite="shapes", output=tmp_path / "out", **FAST))


def test_models_that_do_not_say_what_they_are(adapter, small_sd, tmp_path):
    with pytest.raises(UserError, match="--base is missing"):
        evaluate(EvaluateConfig(erased=small_sd, concept="circle", output=tmp_path / "out", **FAST))
    small = shutil.copytree(small_sd, tmp_path / "small")
    config = json.loads((small / "unet" / "config.json").read_text())
    (small / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 8}))
    with pytest.raises(UserError, match="draw images of other kinds"):
        evaluate(EvaluateConfig(erased=small, base=str(small_sd), concept="circle", output=tmp_path / "out", **FAST))
    with pytest.raises(UserError, match="same directory"):
        evaluate(EvaluateConfig(erased=small_sd, base=str(small_sd), concept="circle", output=tmp_path / "out", **FAST))
    other = shutil.copytree(adapter, tmp_path / "adapter")
    (other / "base.json").unlink()
    (other / "config.yaml").unlink()
    with pytest.raises(UserError, match="--base is missing"):
        evaluate(EvaluateConfig(erased=other, concept="circle", output=tmp_path / "out", **FAST))
    with pytest.raises(UserError, match="--concept is missing"):
        evaluate(EvaluateConfig(erased=other, base=str(small_sd), output=tmp_path / "out", **FAST))
    (adapter / "adapter_model.safetensors").stat()
    (other / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="safetensors"):
        evaluate(EvaluateConfig(erased=other, base=str(small_sd), concept="circle", output=tmp_path / "out", **FAST))


def test_the_command_exits_with_2_and_one_line(tmp_path):
    done = commands.run("evaluate", "--erased", tmp_path / "no", "--output", tmp_path / "out")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --erased") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_it_is_a_function_of_the_package():
    assert callable(esd_peft.evaluate)


def test_the_base_is_read_as_the_adapter_says(small_sd, tmp_path):
    """Of a variant, where that is all there is."""
    model = shutil.copytree(small_sd, tmp_path / "model")
    for file in model.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    options = {
        "num_inference_steps": 2,
        "trajectories": 1,
        "max_train_steps": 1,
        "rank": 2,
        "device": "cpu",
        "num_validation_images": 0,
    }
    erase(EraseConfig(concept="circle", model=str(model), variant="fp16", output=tmp_path / "erased", **options))
    assert open_models(EvaluateConfig(erased=tmp_path / "erased")).base.family.variant == "fp16"
    with pytest.raises(UserError, match="--variant fp16"):
        open_models(EvaluateConfig(erased=tmp_path / "erased", base=str(model)))
