"""Work counted by calls against PyTorch's count of every operation of a run."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esd_peft import EraseConfig, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.flops import CallCosts, Work, work_line
from esd_peft.erasure.work_plan import plan_work
from esd_peft.models import open_family
from families import draw_small, save_family
from runs import few_prompts, few_steps

QUICK = {"num_inference_steps": 3, "max_train_steps": 20, "num_validation_images": 0, "device": "cpu"}
METHODS = {
    "layers": {"max_train_steps": 4},
    "denoiser": {"train_batch_size": 4, "max_train_steps": 4},
    "trajectories": {"trajectories": 3, "train_batch_size": 4},
}


KNOWN: dict[tuple, float] = {}  # the FLOPs of a call depend on the model and the student alone


@pytest.fixture(autouse=True)
def quick(in_full, monkeypatch):
    """Few prompts, images in few steps, and each call measured once."""
    measure = CallCosts.__getitem__

    def remembered(costs, call):
        family, student = costs.family, costs.options.model_dump_json()
        drawn = family.path, family.default_latent_size, family.max_sequence_length
        key = type(family), *drawn, student, costs.checkpointing, call
        if key not in KNOWN:
            KNOWN[key] = measure(costs, call)
        return KNOWN[key]

    monkeypatch.setattr(CallCosts, "__getitem__", remembered)
    few_prompts(monkeypatch.setattr)
    few_steps(monkeypatch.setattr)


def config(model, path, method, **options):
    """A short run by that method."""
    return EraseConfig(concept="circle", model=str(model), output=path, method=method, **QUICK | METHODS[method] | options)


def counted(given):
    """The work as `result.json` has it, and all FLOPs that PyTorch counts: it does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = erase(given)
    return result["work"], counter.get_total_flops() / 1e12


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("layers", {}),
        ("denoiser", {}),
        ("trajectories", {}),
        ("denoiser", {"gradient_checkpointing": True}),
        ("trajectories", {"adapter_type": "none"}),
        ("trajectories", {"rollout": "student", "buffer_refresh_interval": 10}),
    ],
    ids=str,
)
def test_the_work_of_a_run_is_what_pytorch_counts(small_sd, tmp_path, method, options):
    work, everything = counted(config(small_sd, tmp_path / "out", method, **options))
    assert work["total_tflops"] == pytest.approx(everything, rel=0.02)
    assert sum(work["tflops"].values()) == pytest.approx(work["total_tflops"]) and not work["checks_tflops"]
    assert work["denoiser_evaluations_worth"] == round(work["total_tflops"] / work["tflops_of_an_evaluation"])


def test_so_are_the_images_and_the_diagnosis(small_sd, tmp_path):
    given = config(small_sd, tmp_path / "out", "layers", num_validation_images=1, validation_prompt=["a square"])
    work, everything = counted(given)
    assert work["total_tflops"] + sum(work["checks_tflops"].values()) == pytest.approx(everything, rel=0.02)
    assert work["checks_tflops"].keys() == {"diagnosis", "images"}


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_says_at_most_what_a_run_does(small_sd, tmp_path, method):
    shown = {"num_validation_images": 1, "validation_prompt": ["a square"], "max_train_steps": 20}  # as often as planned
    given = config(small_sd, tmp_path / "out", method, **shown)
    family = open_family(given.pretrained.model)
    plan, taken = plan_work(*resolve(given, family), family).to_dict(), erase(given)["work"]
    assert plan["tflops"].keys() == taken["tflops"].keys()
    assert 0.5 * plan["total_tflops"] < taken["total_tflops"] <= 1.001 * plan["total_tflops"]
    for part, most in plan["tflops"].items():
        if part != "trajectories":  # of candidates that are nothing like the concept
            assert taken["tflops"][part] == pytest.approx(most, rel=0.02), part
    for part, most in plan["checks_tflops"].items():
        assert taken["checks_tflops"][part] <= 1.001 * most, part
    assert taken["checks_tflops"]["images"] == pytest.approx(plan["checks_tflops"]["images"])


def test_the_line_says_the_largest_part_first():
    work = Work({"layers": 4e12, "trajectories": 5e12, "text encoders": 1e12}, {"images": 3e12}, evaluation=1e10)
    assert work_line(work.to_dict()) == (
        "work  10.0 TFLOPs (as much as 1,000 denoiser evaluations): trajectories 50 %, layers 40 %, text encoders 10 %; "
        "beside it images: 3.0 TFLOPs"
    )


FAMILIES = ["sdxl", "sd3", "flux dev", "pixart", "sana", "z-image", "flux.2 klein", "qwen-image", "chroma", "wan"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_measured(tmp_path, monkeypatch, name):
    draw_small(monkeypatch)
    family = open_family(str(save_family(name, tmp_path / "model")))
    resolved, _ = resolve(EraseConfig(concept="circle", model=str(family.path), device="cpu"), family)
    costs = CallCosts(family, resolved.student)
    assert 0 < costs["evaluation"] < costs["student evaluation"] < costs["training step"] < 3.5 * costs["evaluation"]
    assert min(costs["prompt 0"], costs["decoded image"]) > 0
    if not family.noise_schedule.is_flow_matching:  # only the method contrastive encodes images, and it refuses these
        assert costs["encoded image"] > 0
    assert (costs["layer step"] > costs["layer answer"] > 0) == family.has_cross_attention
