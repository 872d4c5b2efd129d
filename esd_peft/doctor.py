"""python -m esd_peft.doctor MODEL: the family of a model, its defaults, memory plans for several cards, installed packages.

It loads no weights, and of a hub repository it downloads none.
"""

import shutil
from collections.abc import Iterator
from typing import Any

from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import MemoryEstimator, amount, describe, fit, imagined
from esd_peft.errors import UserError
from esd_peft.io.terminal import say
from esd_peft.models import ModelFamily, open_family
from esd_peft.options.base import parse_bytes
from esd_peft.options.command_line import run_command
from esd_peft.options.commands import read_command_line
from esd_peft.options.doctor import DoctorConfig
from esd_peft.options.erase import EraseConfig
from esd_peft.options.training import BY_PROMPTS, StudentOptions, TrainingOptions
from esd_peft.runtime.devices import describe_device, has_triton, is_accelerator, memory_info, resolve_device, resolve_dtype
from esd_peft.runtime.reproducibility import installed

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
CARDS = {"8 GB": "7GiB", "12 GB": "11GiB", "16 GB": "15GiB", "24 GB": "23GiB"}  # and what driver and desktop leave


def examine(config: DoctorConfig) -> Iterator[str]:
    """Line by line. Raises `UserError` for a model that is not there or not whole."""
    yield from _machine()
    family = open_family(config.model, "MODEL", config, weights=False)
    concept = "something" if family.world is None else next(iter(family.world.attributes.values()))[0]
    options: dict[str, Any] = config.model_dump() | {"concept": concept}
    erase_config = EraseConfig(**options)
    resolved, prompts = resolve(erase_config, family)
    yield from ("", *_model(family), _method(resolved.student, resolved.training), "")
    yield "what fits, as planned (the commands' --plan says more):"
    resolved = imagined(erase_config.runtime, resolved)
    estimator = MemoryEstimator(resolved, prompts, family)
    for card, left in CARDS.items():
        try:
            plan = fit(estimator, erase_config, resolved, parse_bytes(left))
            yield f"  {card:<7}{describe(plan.config)}: {amount(plan.peak)} at most"
        except UserError as error:
            yield f"  {card:<7}does not fit: {error}"


def _machine() -> Iterator[str]:
    yield "packages    " + ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    device = resolve_device("auto")
    name, dtype = describe_device(device), str(resolve_dtype("auto", device)).removeprefix("torch.")
    free, total = memory_info(device)
    yield f"device      {name}, {amount(free)} of {amount(total)} free; computes in {dtype}"
    if has_triton(device):
        yield "kernel      " + ("eager, until triton is installed" if installed("triton") == "none" else "Triton")
        compiler = shutil.which("cc") or shutil.which("gcc")
        yield "compiler    " + ("there" if compiler else "missing: Triton and --compile need one; install gcc")
    elif is_accelerator(device):
        yield "            Only CUDA, ROCm and XPU have --compile, --quantize, 8-bit optimizers and the Triton kernel."
    else:
        yield "            No GPU that PyTorch sees: embedded pipelines take minutes here, anything larger is slow."
        yield "            Only a GPU has --quantize, 8-bit optimizers, --compile and the Triton kernel."


def _model(family: ModelFamily) -> Iterator[str]:
    denoiser = family.empty_denoiser()
    count = sum(p.numel() for p in denoiser.parameters())
    kind = f"{type(family).__name__}, {family.pipeline_class.__name__}"
    yield f"model       {family.name}: {kind}; {type(denoiser).__name__} of {count / 1e6:,.1f} M parameters"
    yield f"            ({amount(2 * count)} in half precision), trajectories of {family.num_inference_steps} steps"
    words = len(family.whole_words())
    yield f"            its tokenizer knows {words:,} words as a whole"


def _method(student: StudentOptions, training: TrainingOptions) -> str:
    page = "attention" if training.method in BY_PROMPTS else "scopes"
    chosen = f"--method {training.method} --max-train-steps {training.max_train_steps} --scope {student.scope}"
    return f"method      {chosen} (docs/{page}.md)"


def main() -> None:
    """The command line."""
    for line in examine(read_command_line(DoctorConfig)):
        say(line)


if __name__ == "__main__":
    run_command(main)
