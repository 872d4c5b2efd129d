"""Work of a run in FLOPs, counted for real models on the meta device. Needs no weights and no GPU.

    python benchmarks/work.py --output benchmarks/results/work.json

It is what `--plan` says, with the defaults and without images: at most what a run does. The real tokenizers do not ship;
as many words as CLIP's knows stand for them, each of one token.
"""

import argparse
import itertools
import json
import string
import tempfile
from pathlib import Path
from typing import Any

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.erasure.flops import work_line
from esd_peft.erasure.work_plan import ImaginedEncoder, plan_work
from esd_peft.models import ModelFamily, open_family
from esd_peft.prompts.augmentation import amounts, augment_prompts
from esd_peft.training.work import count_nfe
from real_models import make_model

CONCEPT = "fox"
WORDS = 32_230  # of CLIP's vocabulary, three letters or more
AUTHORS = 11_240  # evaluations that the authors' scripts take, the backward pass counted as two
RUNS = [("SD 1.5", "layers"), ("SD 1.5", "denoiser"), ("SDXL", "layers"), ("SDXL", "denoiser")]
EMBEDDED = [("emoji", "layers"), ("emoji", "denoiser")]


def real_family(name: str, folder: Path) -> ModelFamily:
    """One of `real_models.MODELS` without weights, with a vocabulary of the real size."""
    family = open_family(str(make_model(name, folder / "model", weights=False)), weights=False)
    made = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    words = list(itertools.islice(made, WORDS))
    family.whole_words = lambda: words
    family.token_counts = lambda texts: [(2 + len(text.split()), 77) for text in texts]
    return family


def planned(family: ModelFamily, model: str, method: str) -> dict[str, Any]:
    """The work of a run by that method with the defaults, without images."""
    given = EraseConfig(concept=CONCEPT, model=model, method=method, num_validation_images=0, device="cpu")
    config, prompts = resolve(given, family)
    encoder = ImaginedEncoder(family)
    augment_prompts(encoder, prompts, config.training.seed, amounts(method))
    work = plan_work(config, prompts, family).to_dict()
    print(f"  {work_line(work)}", flush=True)
    nfe = count_nfe(config.buffer, config.training, config.memory.gradient_checkpointing, prompts)
    by_part = {part: round(tflops / work["tflops_of_an_evaluation"]) for part, tflops in work["tflops"].items()}
    share = work["denoiser_evaluations_worth"] / AUTHORS
    return work | {"nfe": nfe, "prompts": dict(encoder.calls), "evaluations_worth": by_part, "share_of_authors": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the JSON goes")
    args = parser.parse_args()
    found: dict[str, Any] = {"concept": CONCEPT, "words": WORDS, "authors_evaluations": AUTHORS, "runs": {}}
    for name, method in RUNS + EMBEDDED:
        print(f"{name}, {method}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            embedded = (name, method) in EMBEDDED
            family = open_family(name) if embedded else real_family(name, Path(folder))
            model = name if embedded else str(family.path)
            found["runs"][f"{name}, {method}"] = planned(family, model, method)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
