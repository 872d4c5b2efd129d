"""Two training iterations at Stable Diffusion 1.5's real size, with random weights: does it fit, and in what.

    python benchmarks/real_size.py --output benchmarks/results/real_size_cpu.json

Builds the exact architecture in a temporary directory (about 2.2 GB in fp16), runs `esd_peft.erase` on it and writes
seconds and peak memory by phase. Any option of the erase command may follow, `--dtype bfloat16` for example.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from esd_peft import EraseConfig, erase
from esd_peft.erasure.summary import table
from esd_peft.options.command_line import parse
from esd_peft.runtime.devices import describe_device, resolve_device
from real_models import make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sd15"
        make_model("SD 1.5", model, dtype=torch.float16)
        defaults = EraseConfig(
            concept="circle",
            model=str(model),
            output=Path(folder) / "erased",
            method="trajectories",
            num_inference_steps=2,
            trajectories=1,
            train_batch_size=1,
            max_train_steps=2,
            gradient_checkpointing=True,
            optimizer="AdamW8bit",
            num_validation_images=0,
        )
        file = Path(folder) / "config.yaml"
        file.write_text(defaults.to_yaml())
        result = erase(parse(EraseConfig, "python -m esd_peft.erase", ["--config", str(file), *options]))
    print(table(result))
    del result["config"]["pretrained"]["model"], result["config"]["checkpoint"]["output"]  # temporary names
    result["machine"] = {
        "device": describe_device(resolve_device("auto")),
        "torch": torch.__version__,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
