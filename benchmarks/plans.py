"""What `--plan` predicts for the real models at several memory budgets. Needs no weights and no GPU.

python benchmarks/plans.py --output benchmarks/results/plans.md
"""

import argparse
import tempfile
from pathlib import Path

from real_models import MODELS, make_model

from esd_peft import EraseConfig, UserError
from esd_peft.defaults import resolve
from esd_peft.memory.planner import amount, describe, make_plan
from esd_peft.models import open_family

BUDGETS = ("4GiB", "8GiB", "12GiB", "24GiB")
PHASES = ("encode", "load", "rollout", "train", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the table goes")
    args = parser.parse_args()
    lines = ["`python benchmarks/plans.py --output benchmarks/results/plans.md`", ""]
    lines += [f"| model | budget | {' | '.join(PHASES)} | settings |", "|---" * (len(PHASES) + 3) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = make_model(name, Path(folder) / name.replace(" ", "_"), weights=False)
            for budget in BUDGETS:
                config = EraseConfig(concept="Van Gogh", model=str(path), memory_budget=budget)
                try:
                    family = open_family(str(path), weights=False)
                    plan = make_plan(config, *resolve(config, family), family)
                    cells = [*(amount(plan.phases[phase]) for phase in PHASES), describe(plan.config)]
                except UserError as error:
                    cells = ["—"] * len(PHASES) + [str(error).split(" even with")[0]]
                lines.append(f"| {name} | {budget} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
