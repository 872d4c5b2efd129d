"""Memory plans (`--plan`) of the real models on cards of several sizes. Needs no weights and no GPU.

python benchmarks/plans.py

It writes `benchmarks/results/plans.md`, the memory of each phase, and `docs/quickstarts.md`, a command for each model
and card.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from esd_peft import EraseConfig, UserError, doctor
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.planner import WHEN, MemoryEstimator, MemoryPlan, amount, describe, fit, imagined
from esd_peft.models import open_family
from esd_peft.options.base import parse_bytes
from esd_peft.prompts.augmentation import MANY_WORDS
from real_models import MODELS, make_model

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "benchmarks" / "results" / "plans.md", ROOT / "docs" / "quickstarts.md"
CONCEPT = "Van Gogh"
CARDS = {"4 GB": "3GiB"} | doctor.CARDS
PHASES = [*WHEN]
# values of --model
SOURCES = {
    "SD 1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5 --variant fp16",
    "SD 2.1": "path/to/stable-diffusion-2-1",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0 --variant fp16",
    "SD 3.5 medium": "stabilityai/stable-diffusion-3.5-medium",
    "SD 3.5 large": "stabilityai/stable-diffusion-3.5-large",
    "FLUX.1": "black-forest-labs/FLUX.1-dev",
    "PixArt-Σ": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "Sana": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers --variant bf16",
    "Z-Image": "Tongyi-MAI/Z-Image-Turbo",
    "FLUX.2 klein 4B": "black-forest-labs/FLUX.2-klein-4B",
    "Qwen-Image": "Qwen/Qwen-Image",
    "Wan 2.1 1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
}
INTRODUCTION = f"""# Quick starts, by model and card

Written by `python benchmarks/plans.py` from what `--plan` predicts; do not edit it.

A command for each model and size of card. Install as [README.md](../README.md) says, copy the command, put your concept
in the place of {CONCEPT}; then merge, which needs no GPU:

```sh
python -m esd_peft.merge_adapter --adapter erased --output merged
```

A card is counted as 1 GiB less than its name says, for the driver and a desktop. `--memory-budget` is all that has to be
said, and left out it is what the card has free when the command starts. The run chooses, where you do not: the base in
NF4 (`--quantize nf4`) or offloaded to the CPU (`--offload`), gradient checkpointing (`--gradient-checkpointing`),
micro-batches of so many samples, accumulated (`--per-device-batch-size`), and how many trajectories are denoised side by
side (`--rollout-batch-size`). 8 % of the budget is left free. Figures are the peak of a run, predicted for the real
architectures with the defaults, and when it comes; [memory.md](memory.md) says how far predictions were right. How long a
run takes on such a card nobody has measured; `--plan` says how many denoiser evaluations it takes at most. Models that
are gated on the hub need `hf auth login`.
"""


@dataclass(frozen=True)
class Entry:
    """One model on one card: a plan, or why there is none."""

    plan: MemoryPlan | None
    refusal: str = ""


def entries(name: str) -> dict[str, Entry]:
    """One of `real_models.MODELS` on each of `CARDS`."""
    by_card = {}
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(name, Path(folder) / "model", weights=False)
        family = open_family(str(path), weights=False)
        family.whole_words = lambda: ["word"] * MANY_WORDS  # the real tokenizers know thousands, and do not ship
        given = EraseConfig(concept=CONCEPT, model=str(path))
        resolved, prompts = resolve(given, family)
        resolved = imagined(given.runtime, resolved)
        estimator = MemoryEstimator(resolved, prompts, family)
        for card, budget in CARDS.items():
            try:
                by_card[card] = Entry(fit(estimator, given, resolved, parse_bytes(budget)))
            except UserError as error:
                by_card[card] = Entry(None, str(error).partition(" is ")[2].partition(", even with")[0])
    return by_card


def rows(name: str, by_card: dict[str, Entry]) -> list[str]:
    """The model's rows of the table of phases."""
    lines = []
    for card, entry in by_card.items():
        phases = entry.plan.phases if entry.plan else {}
        cells = [amount(phases[phase]) if phase in phases else "" for phase in PHASES]
        settings = describe(entry.plan.config) if entry.plan else f"refused: {entry.refusal}"
        lines.append(f"| {name} | {card} | {CARDS[card]} | {' | '.join(cells)} | {settings} |")
    return lines


def section(name: str, by_card: dict[str, Entry]) -> str:
    """The model's part of the page: its commands, each below what it takes."""
    lines = [f"## {name}", "", "```sh"]
    for card, entry in by_card.items():
        if entry.plan is None:
            lines.append(f"# {card}: refused, {entry.refusal}")
            continue
        lines.append(f"# {card}: {amount(entry.plan.peak)} {WHEN[entry.plan.largest]}; {describe(entry.plan.config)}")
        lines.append(
            f'python -m esd_peft.erase --model {SOURCES[name]} --concept "{CONCEPT}" --output erased '
            f"--memory-budget {CARDS[card]}"
        )
    return "\n".join([*lines, "```", ""])


def overview(by_model: dict[str, dict[str, Entry]]) -> str:
    """Peaks of all models on all cards, and by what they fit."""
    lines = ["| | " + " | ".join(CARDS) + " |", "|---" * (len(CARDS) + 1) + "|"]
    for name, cards in by_model.items():
        lines.append(f"| {name} | " + " | ".join(_cell(entry) for entry in cards.values()) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Entry) -> str:
    if entry.plan is None:
        return "refused"
    memory = entry.plan.config.memory
    how = [memory.quantize] if memory.quantize != "none" else []
    how += ["offloaded"] if memory.offload else []
    how += ["checkpointing"] if memory.gradient_checkpointing and not memory.offload else []
    return ", ".join([amount(entry.plan.peak), *how])


def main() -> None:
    by_model = {}
    for name in MODELS:
        by_model[name] = entries(name)
        print("\n".join(rows(name, by_model[name])), flush=True)
    head = ["`python benchmarks/plans.py`", "", f"| model | card | budget | {' | '.join(PHASES)} | settings |"]
    table = [*head, "|---" * (len(PHASES) + 4) + "|", *(line for name in by_model for line in rows(name, by_model[name]))]
    TABLE.write_text("\n".join(table) + "\n", encoding="utf-8")
    parts = [INTRODUCTION, overview(by_model), *(section(name, by_model[name]) for name in by_model)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
