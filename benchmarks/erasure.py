"""Compare ways to erase on an embedded pipeline: same model, seeds and evaluation, by prompt group.

    python benchmarks/erasure.py procedures --output benchmarks/results/procedures
    python benchmarks/erasure.py sweep --output benchmarks/results/sweep --seeds 0
    python benchmarks/erasure.py implicit --output benchmarks/results/implicit --seeds 0 --images 6 --concepts watermark \
        --prompt-groups implicit
    python benchmarks/erasure.py two-words --output benchmarks/results/two_words --seeds 0 --images 1
    python benchmarks/erasure.py fresh --output benchmarks/results/fresh --seeds 0 --images 1
    python benchmarks/train_families.py --output DIR; python benchmarks/erasure.py families --pipelines DIR \
        --output benchmarks/results/families --seeds 0 --images 1
    git clone https://github.com/rohitgandikota/erasing PEERS/erasing; git clone https://github.com/p1atdev/LECO PEERS/LECO
    python benchmarks/erasure.py scripts --checkouts PEERS --output benchmarks/results/scripts --seeds 0 --images 1

Writes OUTPUT.json (every run), OUTPUT.md (means and worst runs: of the runs that all rows have in common, and of all runs)
and OUTPUT.png (what is left against what neighbours lose, and against the cost; needs matplotlib) after every run. Runs in
OUTPUT.json are not repeated, so an interrupted command continues, and a suite can run in parts. The rows are in
`methods.py`. Seconds are CPU seconds of an erasure, with loading.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from comparison import OWN, save
from methods import CONCEPTS, OWN_CONCEPTS, SUITES, families, scripts

MODEL = "emoji"
NAMED = ("training", "paraphrases", "samplers", "co_occurring")  # groups of prompts with the concept's name


def run(
    job: tuple[str, dict, str, int], images: int, groups: list[str] | None = None, checkouts: Path | None = None
) -> dict:  # fmt: skip
    """Erase a concept with one row's options and one seed; return the rates by prompt group."""
    import torch

    torch.set_num_threads(1)  # workers share the cores
    from esd_peft.evaluation.prompt_groups import PROMPT_GROUPS
    from esd_peft.evaluation.validation import ValidationSampler
    from esd_peft.models.text_encoding import TextEncoder

    method, options, concept, seed = job
    own = {name: value for name, value in options.items() if name not in ("withheld", "trained")}
    family = _opened(own)
    measured = groups
    if groups is None and family.noise_schedule.is_flow_matching:  # the other samplers do not support it
        measured = [name for name in PROMPT_GROUPS if name != "samplers"]
    withheld = _withheld(family.world.name, concept) if "withheld" in options else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, withheld, _only(measured):
        started = sum(os.times()[:4])  # of this process and its children
        erasure = _erased(family, own, concept, seed, Path(folder), checkouts)
        erasure["seconds"] = sum(os.times()[:4]) - started
        preserved = erasure.pop("preserved", [])
        # the same noise for all; prompts that a row preserves by name count as retain set
        with TextEncoder(family, torch.device("cpu"), torch.float32) as encoder:
            sampler = ValidationSampler(encoder, erasure["concepts"], images, 48, 0, preserved)
        sampler.stores["before"] = _before(sampler)
        if "without_concept" in own:
            _remove_concept_from_prompts(sampler, concept)
        sampler.make(erasure.pop("denoiser"), "after")
        groups_found = {key: rates.to_dict() for key, rates in sampler.accuracies().groups.items()}
        groups_found = {key: rates for key, rates in groups_found.items() if "without_concept" not in own or key in NAMED}
    return {
        "method": method,
        "options": options,
        "concept": concept,
        "seed": seed,
        "images": images,
        "only": groups,
        "prompt_groups": groups_found,
    } | erasure


def _opened(options: dict[str, Any]) -> Any:
    """Open the model of `options`; pipelines of `train_families.py` draw the shapes world."""
    from esd_peft.models import open_family
    from esd_peft.options.model import DrawingOptions, PretrainedOptions
    from esd_peft.worlds import WORLDS

    drawing = {name: options[name] for name in DrawingOptions.model_fields if name in options}
    family = open_family(options.get("model", MODEL), options=PretrainedOptions(**drawing))
    family.world = family.world or WORLDS["shapes"]
    return family


def _remove_concept_from_prompts(sampler: Any, concept: str) -> None:
    """Remove the words of the concept from the prompts of `sampler`."""
    import torch

    from esd_peft.models.sampling import encode_prompts

    words = {*concept.split()}
    texts = [" ".join(w for w in p.text.split() if w.strip(".,") not in words) for p in sampler.evaluator.prompts]
    sampler.encoded = encode_prompts(sampler.family, texts, torch.device("cpu"), torch.float32, sampler.evaluator.negatives)


def _erased(
    family: Any, options: dict[str, Any], concept: str, seed: int, folder: Path, checkouts: Path | None
) -> dict:  # fmt: skip
    """Erase the concepts; return the denoiser, the concepts, and the cost."""
    import torch

    from closed_forms import CLOSED_FORMS
    from esd_peft import EraseConfig, erase
    from esd_peft.adapters.saved import read_adapter
    from esd_peft.merge_adapter import merge_adapter
    from esd_peft.options.merge import MergeConfig
    from peer_scripts import PEERS

    if "without_concept" in options:
        return {"concepts": [concept], "denoiser": family.load_denoiser(torch.float32), "nfe": 0}
    if "closed_form_of" in options:
        edit = CLOSED_FORMS[options["closed_form_of"]]
        denoiser = edit(family, [concept], **{k: v for k, v in options.items() if k != "closed_form_of"})
        return {"concepts": [concept], "denoiser": denoiser, "nfe": 0}
    if "script_of" in options:
        assert checkouts is not None
        peer = options["script_of"]
        denoiser, nfe = PEERS[peer].run(family, concept, seed, folder, checkouts / peer, options["learning_rate"])
        return {"concepts": [concept], "denoiser": denoiser, "nfe": nfe}
    steps = options.get("sequence", [options.get("concept", concept)])
    model, nfe = options.get("model", MODEL), 0
    concepts: list[str] = []
    preserved: list[str] = []
    for number, named in enumerate(steps):  # each on the merged model before it
        output = folder / f"erased{number}"
        row_options = {name: value for name, value in options.items() if name != "sequence"} | {
            "concept": named,
            "model": model,
        }
        config = EraseConfig(**row_options, seed=seed, output=output, num_validation_images=0, device="cpu")
        result = erase(config)
        concepts += config.prompts.concept_names
        preserved += result["config"]["prompts"]["preserve"]
        nfe += result["nfe"]
        if len(steps) > 1:
            model = str(folder / f"merged{number}")
            merge_adapter(MergeConfig(adapter=[output], output=Path(model), verify=False))
    if len(steps) > 1:
        denoiser = _opened({"model": model}).load_denoiser(torch.float32)
    else:
        denoiser = read_adapter(output).apply(family.load_denoiser(torch.float32))
    return {"concepts": concepts, "preserved": preserved, "denoiser": denoiser, "nfe": nfe}


@contextlib.contextmanager
def _withheld(world: str, concept: str) -> Iterator[None]:
    """Hide the measured neighbours and unrelated labels from the vocabulary of every tokenizer."""
    from esd_peft.evaluation.prompt_groups import PRESERVATION_GROUPS
    from esd_peft.evaluation.suites import load_suite, suite_prompts
    from esd_peft.models.family import ModelFamily

    prompts = suite_prompts(load_suite(world), [concept], None)
    measured = {p.subject for p in prompts if p.group in PRESERVATION_GROUPS}
    words, known = {word for label in measured for word in label.split()}, ModelFamily.whole_words
    with mock.patch.object(ModelFamily, "whole_words", lambda self: [w for w in known(self) if w not in words]):
        yield


@contextlib.contextmanager
def _only(groups: list[str] | None) -> Iterator[None]:
    """Restrict validation prompts to `groups`; None: all."""
    from esd_peft.evaluation import validation

    known = validation.suite_prompts

    def restricted(*args: Any) -> list[Any]:
        return [prompt for prompt in known(*args) if not groups or prompt.group in groups]

    with mock.patch.object(validation, "suite_prompts", restricted):
        yield


def _before(sampler):  # type: ignore[no-untyped-def]
    """Return the images of the base, drawn once for each concept: they are the same for every method and seed."""
    import torch

    from esd_peft.evaluation.image_cache import ImageMemory
    from esd_peft.io.images import decode_image

    weights = "".join(sampler.family.denoiser_hashes().values())
    key = f"{sampler.evaluator.prompts} {sampler.seeds} {weights}"
    cache = Path(tempfile.gettempdir()) / f"esd_peft_before_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not cache.is_dir():
        sampler.make(sampler.family.load_denoiser(torch.float32), "before")
        draft = cache.with_suffix(f".{os.getpid()}")
        draft.mkdir()
        for (i, k), image in sampler.stores["before"].images.items():
            image.save(draft / f"{i}_{k}.png")
        with contextlib.suppress(OSError):  # another worker was quicker
            draft.rename(cache)
    places = {path: tuple(map(int, path.stem.split("_"))) for path in cache.iterdir()}
    return ImageMemory({place: decode_image(path) for path, place in places.items()})


def main() -> None:
    from esd_peft.evaluation.prompt_groups import PROMPT_GROUPS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--methods", nargs="+", help="only these rows of the suite")
    parser.add_argument("--concepts", nargs="+", help="left out: those of the suite")
    parser.add_argument("--pipelines", type=Path, help="of suite families: where train_families.py wrote them")
    parser.add_argument("--checkouts", type=Path, help="of suite scripts: where the peers' repositories lie")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2, help="a prompt")
    parser.add_argument("--prompt-groups", nargs="+", choices=PROMPT_GROUPS, help="only prompts of these; left out: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    for owner, option, rows in (("families", "pipelines", families), ("scripts", "checkouts", scripts)):
        folder = getattr(args, option)
        if (args.suite == owner) != (folder is not None):
            parser.error(f"--{option} is what suite {owner} needs, and no other suite")
        suite = suite if folder is None else rows(folder)
    if not suite:
        parser.error(f"--pipelines {args.pipelines} holds no KIND.json; run train_families.py --output there first")
    concepts = args.concepts or OWN_CONCEPTS.get(args.suite, CONCEPTS)
    if unknown := set(args.methods or ()) - set(suite):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not in the suite; it has {', '.join(suite)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file = args.output.with_suffix(".json")
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    # runs with other options under the same name, or with other images, are repeated
    judged = (args.images, args.prompt_groups)
    runs = [r for r in runs if r.get("options") == suite.get(r["method"]) and (r["images"], r.get("only")) == judged]
    done = {(r["method"], r["concept"], r["seed"]) for r in runs}
    jobs = [
        (m, suite[m], c, s)
        for s in args.seeds
        for m in args.methods or suite
        for c in ([OWN] if {"concept", "sequence"} & {*suite[m]} else concepts)  # some rows bring their own
    ]
    jobs = [job for job in jobs if (job[0], *job[2:]) not in done]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a kill ends the workers too
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        one = functools.partial(run, images=args.images, groups=args.prompt_groups, checkouts=args.checkouts)
        for result in pool.imap_unordered(one, jobs):
            runs.append(result)
            save(args.output, suite, runs)
            left = next(iter(result["prompt_groups"].values()))["after"]["share"]
            print(f"{len(runs)} {result['method']}, {result['concept']}: {left:.1%} left", flush=True)
    print(save(args.output, suite, runs))


if __name__ == "__main__":
    main()
