"""The whole job on an emulated GPU, where tensors of two devices that meet are an error, against the same job on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from esd_peft import EraseConfig, erase

HELPERS = Path(__file__).parents[1] / "helpers"
QUICK = {"concept": "circle", "num_inference_steps": 3, "trajectories": 2, "max_train_steps": 2, "train_batch_size": 4,
         "num_validation_images": 0, "learning_rate": 1e-3}  # fmt: skip
ON_THE_GPU = """
import json, sys
from emulated_cuda import emulated_cuda  # before PyTorch
answers, sys.stdout = sys.stdout, sys.stderr
from esd_peft import EraseConfig, erase
from runs import few_prompts, few_steps
few_prompts(setattr)
few_steps(setattr)
with emulated_cuda():
    for line in sys.stdin:
        print(json.dumps(erase(EraseConfig(**json.loads(line)))["loss"]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def erase_there(tmp_path_factory, small_sd):
    """Erases on the emulated GPU, all runs in one process, and returns the loss. A run that fails ends the process."""
    errors = tmp_path_factory.mktemp("gpu") / "errors"
    with errors.open("w") as file:
        command, pipe = [sys.executable, "-c", ON_THE_GPU], subprocess.PIPE
        process = subprocess.Popen(command, cwd=HELPERS, stdin=pipe, stdout=pipe, stderr=file, text=True)

    def run(options, output):
        given = QUICK | {"model": str(small_sd)} | options | {"output": str(output), "device": "cuda"}
        process.stdin.write(json.dumps(given) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, errors.read_text()
        return json.loads(answer)

    yield run
    process.stdin.close()
    assert process.wait(60) == 0, errors.read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16", "scope": "full"},  # with loss scaling
        {"dtype": "bfloat16", "optimizer": "AdamW8bit"},
        {"dtype": "bfloat16", "adapter_type": "none", "scope": "esd-x"},  # under autocast
        {"dtype": "float32", "offload": True},
        {"dtype": "float32", "rollout": "student", "buffer_refresh_interval": 1, "adapter_type": "lokr"},
        {"dtype": "float32", "per_device_batch_size": 1, "map_to": "square"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_as_on_the_cpu(small_sd, tmp_path, erase_there, options):
    exact = options["dtype"] == "float32"
    options = options | {"model": str(small_sd) if exact else "shapes"}  # of random weights the loss is mostly rounding
    there = erase_there(options, tmp_path / "gpu")
    here = erase(EraseConfig(**(QUICK | options | {"output": tmp_path / "cpu", "device": "cpu"})))["loss"]
    assert there == pytest.approx(here, rel=1e-4 if exact else 0.05)
    name = "denoiser_weights" if options.get("adapter_type") == "none" else "adapter_model"
    first, second = (load_file(tmp_path / place / f"{name}.safetensors") for place in ("cpu", "gpu"))
    assert first.keys() == second.keys()
    for key, value in first.items() if exact else ():  # in few bits the singular vectors they start from are others
        # rounding turns these a little, and Adam's steps for values without a gradient: a few hundredths of a tensor
        assert (second[key] - value).norm() < 0.1 * value.norm(), key


@pytest.mark.parametrize(
    "options",
    [
        {"method": "layers", "dtype": "float16", "offload": True},
        {"method": "layers", "dtype": "bfloat16", "adapter_type": "none", "map_to": "square"},
        {"method": "layers", "dtype": "float32", "per_device_batch_size": 1, "unprompted_guidance": 1.0},
        {"method": "denoiser", "dtype": "float16", "per_device_batch_size": 2},
        {"method": "denoiser", "dtype": "bfloat16", "map_to": "square"},
        {"method": "contrastive", "dtype": "bfloat16", "num_inference_steps": None},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_other_methods(tmp_path, erase_there, options):
    given = {"trajectories": None, "max_train_steps": 1} | options
    assert 0 < erase_there(given, tmp_path / "gpu")["first"] < 100


def test_images(tmp_path, erase_there):
    erase_there({"num_validation_images": 1, "dtype": "float16"}, tmp_path / "gpu")
    assert (tmp_path / "gpu" / "before_after.png").is_file()


MISTAKES = """
import json
from emulated_cuda import emulated_cuda
import torch
from esd_kernels import guided_mse
def tried(mistake):
    try:
        mistake()
    except RuntimeError:
        return "refused"
    return "done"
with emulated_cuda():
    here, there = torch.randn(3, 3), torch.randn(3, 3, device="cuda")
    print(json.dumps({name: tried(mistake) for name, mistake in {
        "a sum": lambda: here + there,
        "a product": lambda: here @ there,
        "a layer": lambda: torch.nn.Linear(3, 3)(there),
        "joined": lambda: torch.cat([here, there]),
        "in place": lambda: here.add_(there),
        "indices there": lambda: here[torch.tensor([0], device="cuda")],
        "the CPU's generator": lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        "the kernel": lambda: guided_mse(there, torch.randn(6, 3), 1.0),
        "two dtypes": lambda: there @ there.half(),
        "a number": lambda: there + torch.tensor(2.0),
        "indices here": lambda: there[torch.tensor([0])],
        "copied": lambda: here.copy_(there),
        "the kernel there": lambda: guided_mse(there, torch.randn(6, 3, device="cuda"), 1.0),
    }.items()}))
"""


def test_mistakes_are_seen():
    """What a GPU refuses is refused, and nothing else is."""
    allowed = ["a number", "indices here", "copied", "the kernel there"]
    done = subprocess.run([sys.executable, "-c", MISTAKES], cwd=HELPERS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert [name for name, outcome in outcomes.items() if outcome == "done"] == allowed
