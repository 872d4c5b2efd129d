"""Plans against what PyTorch's allocator says, and the settings that a budget leads to."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from esd_peft import EraseConfig, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import MemoryEstimator, fit, make_plan
from esd_peft.errors import UserError
from esd_peft.models import open_family
from esd_peft.options.base import parse_bytes
from esd_peft.runtime.devices import usable_memory
from esd_peft.training.learners import POSITIONS, CrossAttention
from esd_peft.training.student import make_student
from families import draw_small, save_family
from pipelines import small_stable_diffusion

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux dev", "pixart", "sana", "z-image"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    return small_stable_diffusion(path) if request.param == "sd" else save_family(request.param, path)


def estimate(**options):
    """The options as given, as resolved, the family, and what plans for them are made up of."""
    given = EraseConfig(device="cpu", **options)
    family = open_family(given.pretrained.model)
    resolved, prompts = resolve(given, family)
    return given, resolved, family, MemoryEstimator(resolved, prompts, family)


def planned(given):
    family = open_family(given.pretrained.model)
    return make_plan(given, *resolve(given, family), family)


def allocated(step) -> int:
    """The most that a step had allocated at a time, as the CPU allocator reports it."""
    step()  # what is made once and kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = peak = 0
    for event in sorted(
        (e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_and_allocated_memory_of_a_step(model, checkpointing, monkeypatch):
    draw_small(monkeypatch, 32)
    count = 3
    options = {"concept": "circle", "model": str(model), "gradient_checkpointing": checkpointing}
    _, config, family, sizes = estimate(**options)
    denoiser = family.load_denoiser(torch.float32)
    student = make_student(family, denoiser, config.student, CPU, torch.float32)
    embeds = family.encode(["a circle"] * count, CPU, torch.float32)
    latents = family.initial_latents(count, denoiser, torch.Generator().manual_seed(0))
    if checkpointing:
        denoiser.enable_gradient_checkpointing()

    def predict():
        return family.predict(denoiser, latents, torch.full((count,), 500.0), embeds)

    def train():
        predict().square().mean().backward()
        for parameter in student.parameters:
            parameter.grad = None

    with torch.no_grad():
        running = allocated(predict)
    line = sizes.running[0] + (count - 1) * (sizes.running[1] - sizes.running[0])
    assert line == pytest.approx(running, rel=0.15)
    line = sizes.training(checkpointing)
    assert line[0] + (count - 1) * (line[1] - line[0]) == pytest.approx(allocated(train), rel=0.15)


def test_a_budget_leads_to_the_cheapest_settings_that_fit(small_sd):
    given, config, _, sizes = estimate(concept="circle", model=str(small_sd))
    free = fit(sizes, given, config, 2**40)
    assert free.config == config
    tight = fit(sizes, given, config, int(free.peak * 0.75))
    assert tight.peak <= 0.75 * free.peak
    memory = tight.config.memory
    assert memory.quantize == "none" and not memory.gradient_checkpointing
    assert memory.per_device_batch_size < config.memory.per_device_batch_size == 8
    says = r"--memory-budget 1.0 MiB is .* short: .* in training, and 8% left free, even with the base offloaded to the CPU"
    with pytest.raises(UserError, match=says):
        fit(sizes, given, config, 2**20)


def test_a_budget_leaves_what_the_config_sets_itself(small_sd):
    options = {"quantize": "int8", "per_device_batch_size": 4, "gradient_checkpointing": True, "memory_budget": "3MiB"}
    with pytest.raises(UserError, match="even with the base in int8, gradient checkpointing, micro-batches of 4"):
        planned(EraseConfig(concept="circle", model=str(small_sd), device="cpu", **options))


def of_a_run(model, output, **options):
    """A short run's config."""
    short = {"num_validation_images": 0, "num_inference_steps": 3, "max_train_steps": 2, "preserve": "a square"}
    return EraseConfig(concept="circle", model=str(model), output=output, device="cpu", **short | options)


def test_nfe_is_that_of_the_run(small_sd, tmp_path):
    config = of_a_run(small_sd, tmp_path / "out", trajectories=5)
    assert planned(config).nfe == erase(config)["nfe"]


@pytest.mark.parametrize("method", ["layers", "denoiser"])
def test_nfe_of_the_methods_with_many_prompts_is_what_the_run_takes_at_most(tmp_path, method):
    """Synonyms are sought among as many candidates as there are, and a candidate that is like nothing is left early."""
    config = of_a_run("shapes", tmp_path / "out", method=method)
    most, taken = planned(config).nfe, erase(config)["nfe"]
    assert 0.4 * most < taken <= most


def test_a_step_of_layers_takes_what_its_micro_batch_does(small_sd):
    """Cross-attention learns at hidden states, in micro-batches like the denoiser, and in much less than that."""

    def phases(**options):
        given = EraseConfig(concept="circle", model="emoji", device="cpu", **options)
        return planned(given).phases

    whole, few, one = (phases(method="layers", per_device_batch_size=size) for size in (32, 4, 1))
    assert whole["train"] > few["train"] > one["train"]
    assert (whole["train"] - one["train"]) / (few["train"] - one["train"]) == pytest.approx(31 / 3, rel=1e-3)
    assert {*whole.items()} - {*few.items()} == {("train", whole["train"])}, "nothing else depends on it"
    denoiser = phases(method="denoiser", train_batch_size=32)
    assert whole["train"] < denoiser["train"]


def test_a_budget_leads_layers_to_micro_batches():
    options = {"concept": "circle", "model": "emoji", "method": "layers", "train_batch_size": 256}
    given, config, _, sizes = estimate(**options)
    free = fit(sizes, given, config, 2**40)
    assert free.config == config and free.largest == "train"
    tight = fit(sizes, given, config, int(free.peak * 0.75))
    memory = tight.config.memory
    assert tight.peak <= 0.75 * free.peak and memory.quantize == "none" and not memory.gradient_checkpointing
    assert 256 % memory.per_device_batch_size == 0 and memory.per_device_batch_size < 256


def test_predicted_and_allocated_memory_of_a_step_of_layers():
    _, config, family, sizes = estimate(concept="fox", model="emoji", method="layers")
    student = make_student(family, family.load_denoiser(torch.float32), config.student, CPU, torch.float32)
    learner, count = CrossAttention(student), 8
    embeds = family.encode(["a fox"] * count, CPU, torch.float32)
    hidden = {name: torch.randn(count, POSITIONS, layer.width) for name, layer in learner.layers.items()}

    def train():
        sum(output.square().mean() for output in learner.predict(hidden, embeds).values()).backward()
        for parameter in student.parameters:
            parameter.grad = None

    line, taken = sizes.attending(), allocated(train)
    # the tensors without values keep attention's probabilities, which the CPU's attention does not
    assert taken <= line[0] + (count - 1) * (line[1] - line[0]) <= 1.5 * taken


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GiB", 12 * 2**30), ("12 GB", 12 * 10**9), ("1.5g", 3 * 2**29), ("800M", 800 * 2**20), ("4096", 4096)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0GiB", "GiB", "9" * 200, "1" + "0" * 200 + "GiB", "１２"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UserError, match="12GiB, for example"):
        EraseConfig(concept="circle", memory_budget=text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter_type", ["lora", "loha", "lokr", "none"])
def test_every_adapter_in_every_dtype_and_scope_has_a_plan(small_sd, adapter_type, dtype):
    for scope in ("esd-x-strict", "esd-u", "full"):
        options = {"adapter_type": adapter_type, "dtype": dtype, "scope": scope}
        assert planned(EraseConfig(concept="x", model=str(small_sd), device="cpu", **options)).peak > 2**20


def test_what_autocast_takes_is_within_the_plan(small_sd):
    count, half = 3, torch.bfloat16
    options = {"adapter_type": "none", "scope": "full", "dtype": "bfloat16"}
    _, config, family, sizes = estimate(concept="x", model=str(small_sd), **options)
    denoiser = family.load_denoiser(torch.float32)
    student = make_student(family, denoiser, config.student, CPU, half)
    embeds = family.encode(["a circle"] * count, CPU, half)
    latents = family.initial_latents(count, denoiser, torch.Generator().manual_seed(0)).to(half)

    def train():
        with torch.autocast("cpu", half):
            prediction = family.predict(denoiser, latents, torch.full((count,), 500.0), embeds)
        prediction.float().square().mean().backward()
        for parameter in student.parameters:
            parameter.grad = None

    weights = sum(p.numel() for p in student.parameters)
    learning = sizes.learning - 3 * 4 * weights  # without the teacher's copy and Adam's moments: those of autocast
    line = sizes.training(False)
    taken = allocated(train)
    assert taken <= line[0] + (count - 1) * (line[1] - line[0]) + learning <= 2.2 * taken


def test_what_pytorch_keeps_of_a_gpu_is_free_as_well(monkeypatch):
    sizes = {"memory_reserved": 5 * 2**30, "memory_allocated": 2 * 2**30, "mem_get_info": (2**30, 12 * 2**30)}
    for name, value in sizes.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert usable_memory(torch.device("cuda:0")) == 4 * 2**30
