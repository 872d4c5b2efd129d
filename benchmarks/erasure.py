"""Compare ways to erase on an embedded pipeline: same model, seeds and evaluation, by strata.

    python benchmarks/erasure.py procedures --output benchmarks/results/procedures
    python benchmarks/erasure.py sweep --output benchmarks/results/sweep --seeds 0
    python benchmarks/erasure.py unnamed --output benchmarks/results/unnamed --seeds 0 --images 6 --concepts watermark \
        --strata unnamed
    python benchmarks/train_families.py --output DIR; python benchmarks/erasure.py families --pipelines DIR \
        --output benchmarks/results/families --seeds 0 --images 1

Writes OUTPUT.json (every run), OUTPUT.md (tables of means and worsts: of the runs that all rows have in common, and of all
runs) and OUTPUT.png (what is left against what neighbours lose, and against the cost; needs matplotlib), anew after every
run. What OUTPUT.json already holds is not run again, so an
interrupted command goes on where it was. Rows are in `methods.py`. Seconds are those that the CPU works on an erasure,
loading included.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from methods import CONCEPTS, SHAPES, SUITES, families

MODEL = "emoji"
OWN = "-"  # in place of a concept, where a row brings its own
NAMED = ("trained", "wordings", "sampling", "beside")  # strata whose prompts have the concept's name in them


def run(job: tuple[str, dict, str, int], images: int, strata: list[str] | None = None) -> dict:
    """Erase one way with one seed; the rates of the result, by strata."""
    import torch

    torch.set_num_threads(1)  # workers share the cores
    from esd_peft.evaluation.strata import STRATA
    from esd_peft.evaluation.validation import ValidationSampler

    method, options, concept, seed = job
    own = {name: value for name, value in options.items() if name not in ("withheld", "trained")}
    family = _opened(own)
    measured = strata
    if strata is None and family.noise_schedule.is_flow_matching:  # there the world's other samplers do not work
        measured = [name for name in STRATA if name != "sampling"]
    withheld = _withheld(family.world.name, concept) if "withheld" in options else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, withheld, _only(measured):
        started = time.process_time()
        made = _erased(family, own, concept, seed, Path(folder))
        made["seconds"] = time.process_time() - started
        cpu, preserved = torch.device("cpu"), made.pop("preserved", [])
        # the same noise for all; what a row preserves by name counts as listed
        sampler = ValidationSampler(family, made["concepts"], images, 48, 0, cpu, torch.float32, preserved)
        sampler.stores["before"] = _before(sampler)
        if "asked_without" in own:
            _ask_without(sampler, concept)
        sampler.make(made.pop("denoiser"), "after")
        found = {key: rates.to_dict() for key, rates in sampler.accuracies().strata.items()}
        found = {key: rates for key, rates in found.items() if "asked_without" not in own or key in NAMED}
    return {
        "method": method,
        "options": options,
        "concept": concept,
        "seed": seed,
        "images": images,
        "only": strata,
        "strata": found,
    } | made


def _opened(options: dict[str, Any]) -> Any:
    """The family of the model that `options` are for; one of `train_families.py` draws the shapes world."""
    from esd_peft.models import open_family
    from esd_peft.models.options import DrawingOptions, PretrainedOptions
    from esd_peft.worlds import WORLDS

    drawing = {name: options[name] for name in DrawingOptions.model_fields if name in options}
    family = open_family(options.get("model", MODEL), options=PretrainedOptions(**drawing))
    family.world = family.world or WORLDS["shapes"]
    return family


def _ask_without(sampler: Any, concept: str) -> None:
    """Let `sampler` make its images of prompts without the words that name the concept."""
    import torch

    from esd_peft.models.sampling import encode_prompts

    words = {*concept.split()}
    texts = [" ".join(w for w in p.text.split() if w.strip(".,") not in words) for p in sampler.evaluator.prompts]
    sampler.encoded = encode_prompts(sampler.family, texts, torch.device("cpu"), torch.float32, sampler.evaluator.negatives)


def _erased(family: Any, options: dict[str, Any], concept: str, seed: int, folder: Path) -> dict:
    """The denoiser of `family` without the concepts, which these are, and what that cost."""
    import torch
    from closed_forms import CLOSED_FORMS

    from esd_peft import EraseConfig, erase
    from esd_peft.adapters.options import MergeConfig
    from esd_peft.adapters.saved import read_adapter
    from esd_peft.merge_adapter import merge_adapter

    if "asked_without" in options:
        return {"concepts": [concept], "denoiser": family.load_denoiser(torch.float32), "nfe": 0}
    if "closed_form_of" in options:
        edit = CLOSED_FORMS[options["closed_form_of"]]
        denoiser = edit(family, [concept], **{k: v for k, v in options.items() if k != "closed_form_of"})
        return {"concepts": [concept], "denoiser": denoiser, "nfe": 0}
    steps = options.get("sequence", [options.get("concept", concept)])
    model, nfe = options.get("model", MODEL), 0
    concepts: list[str] = []
    preserved: list[str] = []
    for number, named in enumerate(steps):  # each on the merged model before it
        output = folder / f"erased{number}"
        given = {name: value for name, value in options.items() if name != "sequence"} | {"concept": named, "model": model}
        config = EraseConfig(**given, seed=seed, output=output, num_validation_images=0, device="cpu")
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
    """Within it no tokenizer knows the names of what is measured as kept beside the concept, and is on no list."""
    from esd_peft.evaluation.strata import KEPT
    from esd_peft.evaluation.suites import load_suite, suite_prompts
    from esd_peft.models.family import ModelFamily

    measured = {p.about for p in suite_prompts(load_suite(world), [concept], None) if p.stratum in KEPT}
    words, known = {word for label in measured for word in label.split()}, ModelFamily.whole_words
    with mock.patch.object(ModelFamily, "whole_words", lambda self: [w for w in known(self) if w not in words]):
        yield


@contextlib.contextmanager
def _only(strata: list[str] | None) -> Iterator[None]:
    """Within it images are made of prompts of these strata only; of all, where none are named."""
    from esd_peft.evaluation import validation

    known = validation.suite_prompts

    def chosen(*given: Any) -> list[Any]:
        return [prompt for prompt in known(*given) if not strata or prompt.stratum in strata]

    with mock.patch.object(validation, "suite_prompts", chosen):
        yield


def _before(sampler):  # type: ignore[no-untyped-def]
    """The base's images, made once a concept: they are the same for every method and seed."""
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


def summary(runs: list[dict]) -> dict[str, Any]:
    """Of each stratum the mean over concepts, of whose seeds the mean counts, with its 95 % interval, and the worst run.

    Seeds of one concept are more alike than concepts are; so one concept has no interval.
    """
    from esd_peft.evaluation.intervals import bootstrap_mean

    strata: dict[str, dict] = {}
    for key in dict.fromkeys(key for r in runs for key in r["strata"]):
        found = [r["strata"][key] for r in runs if key in r["strata"]]
        erased = found[0]["erased"]
        values = [s["after"]["share"] if erased else s["lost"] for s in found]
        by_concept: dict[str, list[float]] = {}
        for r, value in zip((r for r in runs if key in r["strata"]), values, strict=True):
            by_concept.setdefault(r["concept"], []).append(value)
        means = [sum(v) / len(v) for v in by_concept.values()]
        strata[key] = {
            "title": found[0]["title"],
            "erased": erased,
            "seen": found[0]["seen"],
            "before": sum(s["before"]["share"] for s in found) / len(found),
            "mean": sum(means) / len(means),
            "interval": bootstrap_mean(means, 0) if len(means) > 1 else None,
            "worst": max(values),
        }
    seconds = [r["seconds"] for r in runs if r["seconds"] is not None]  # of some runs nobody knows
    return {
        "runs": len(runs),
        "strata": strata,
        "nfe": sum(r["nfe"] for r in runs) / max(1, len(runs)),
        "seconds": sum(seconds) / len(seconds) if seconds else None,
    }


SHORT = {
    "wordings": "other wordings",
    "synonyms": "other names",
    "sampling": "other samplers",
    "unnamed": "unnamed",
    "neighbours": "neighbours",
    "unlisted": "the rest",
    "beside": "beside it",
    "listed": "(seen) listed",
}


def in_common(by_method: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Of each method the runs with the concepts and seeds that all methods have run; rows that bring concepts of their own
    have none in common."""
    cases = [{(r["concept"], r["seed"]) for r in runs if r["concept"] != OWN} for runs in by_method.values()]
    shared = set.intersection(*cases)
    return {m: [r for r in runs if (r["concept"], r["seed"]) in shared] for m, runs in by_method.items()}


def short_table(found: dict[str, dict]) -> str:
    """One line a method: means, and the worst run, in per cent that are left and points that are lost."""
    heads = [f"| | runs | {' | '.join(SHORT.values())} | NFE |", "|---" * (len(SHORT) + 3) + "|"]
    lines = []
    for name, s in found.items():
        rates = [s["strata"].get(key) for key in SHORT]
        cells = ["" if r is None else f"{100 * r['mean']:z.1f} ({100 * r['worst']:z.0f})" for r in rates]
        lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} |")
    return "\n".join([*heads, *lines])


def markdown(found: dict[str, dict], shared: dict[str, dict], command: str) -> str:
    """The summaries as tables: of the runs in common in short, and of each all that is known."""
    lines = [f"`{command}`", ""]
    if any(s["runs"] for s in shared.values()):
        lines += ["The runs that all rows have in common: means (worst run), in per cent left and in points lost.", ""]
        lines += [short_table(shared), ""]
    lines += _tables("All runs", found)
    return "\n".join(lines)


def _tables(title: str, found: dict[str, dict]) -> list[str]:
    """What is left of the concepts, and what is lost of the rest, with intervals."""
    strata = {key: s for summed in found.values() for key, s in summed["strata"].items()}
    lines = []
    for erased, says in ((True, "left of the concept, in per cent of images"), (False, "lost of the rest, in points")):
        keys = [key for seen in (False, True) for key, s in strata.items() if (s["erased"], s["seen"]) == (erased, seen)]
        heads = [("(seen) " if strata[key]["seen"] else "") + strata[key]["title"] for key in keys]
        lines += [f"{title}, {says}: mean over concepts (95 %; worst run)", ""]
        lines += [f"| | runs | {' | '.join(heads)} | NFE | CPU seconds |", "|---" * (len(keys) + 4) + "|"]
        for name, s in found.items():
            cells = [_cell(s["strata"].get(key)) for key in keys]
            seconds = "" if s["seconds"] is None else f"{s['seconds']:.1f}"
            lines.append(f"| {name} | {s['runs']} | {' | '.join(cells)} | {s['nfe']:,.0f} | {seconds} |")
        lines.append("")
    return lines


def _cell(s: dict | None) -> str:
    if s is None:
        return ""
    between = "" if s["interval"] is None else "{:.1f} to {:.1f}; ".format(*(100 * bound for bound in s["interval"]))
    return f"{100 * s['mean']:.1f} ({between}{100 * s['worst']:.0f})"


def plot(found: dict[str, dict], path: Path) -> None:
    """What is left by other wordings against what unlisted neighbours lose, and against the cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # of what is drawn everywhere nothing is a neighbour
    found = {name: s for name, s in found.items() if {"wordings", "neighbours"} <= {*s["strata"]}}
    if not found:
        return
    figure, (kept, cost) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for number, (name, s) in enumerate(found.items()):
        left = 100 * s["strata"]["wordings"]["mean"]
        for axes, x in ((kept, 100 * s["strata"]["neighbours"]["mean"]), (cost, max(1, s["nfe"]))):
            axes.plot(x, left, "os^D"[number // 10], label=name)  # the colours repeat after ten
    kept.set(xlabel="neighbours that nobody listed lose (points)", ylabel="left in unseen wordings (%)")
    cost.set(xlabel="denoiser evaluations (NFE)", xscale="log")
    figure.legend(*kept.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    from esd_peft.evaluation.strata import STRATA

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--output", type=Path, required=True, help="where the results go, without suffix")
    parser.add_argument("--methods", nargs="+", help="only these rows of the suite")
    parser.add_argument("--concepts", nargs="+", help="left out: those of the suite")
    parser.add_argument("--pipelines", type=Path, help="of suite families: where train_families.py wrote them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=2, help="a prompt")
    parser.add_argument("--strata", nargs="+", choices=STRATA, help="only prompts of these; left out: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, of one thread each")
    args = parser.parse_args()
    if (args.suite == "families") != (args.pipelines is not None):
        parser.error("--pipelines is what suite families needs, and no other suite")
    suite = families(args.pipelines) if args.suite == "families" else SUITES[args.suite]
    if not suite:
        parser.error(f"--pipelines {args.pipelines} holds no KIND.json; run train_families.py --output there first")
    concepts = args.concepts or (SHAPES if args.suite == "families" else CONCEPTS)
    if unknown := set(args.methods or ()) - set(suite):
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not in the suite; it has {', '.join(suite)}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    file = args.output.with_suffix(".json")
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    # what was run with other options under the same name, or judged on other images, is run anew
    judged = (args.images, args.strata)
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
        for result in pool.imap_unordered(functools.partial(run, images=args.images, strata=args.strata), jobs):
            runs.append(result)
            save(args.output, suite, runs)
            left = next(iter(result["strata"].values()))["after"]["share"]
            print(f"{len(runs)} {result['method']}, {result['concept']}: {left:.1%} left", flush=True)
    print(save(args.output, suite, runs))


def save(output: Path, suite: dict[str, dict], runs: list[dict]) -> str:
    """Write all results, of the rows of `suite`; returns the tables."""
    by_method = {m: [r for r in runs if r["method"] == m] for m in suite}
    by_method = {m: rows for m, rows in by_method.items() if rows}
    found = {m: summary(rows) for m, rows in by_method.items()}
    shared = {m: summary(rows) for m, rows in in_common(by_method).items()}
    options = {m: suite[m] for m in found}
    command = shlex.join(["python", *sys.argv])
    head = json.dumps({"command": command, "cpus": os.cpu_count(), "options": options, "summary": found}, indent=1)
    lines = ",\n".join(json.dumps(run) for run in runs)  # one each, so that a difference shows which is new
    draft = output.with_suffix(".tmp")
    draft.write_text(f'{head.removesuffix("}").rstrip()},\n "runs": [\n{lines}\n ]\n}}\n')
    draft.replace(output.with_suffix(".json"))
    tables = markdown(found, shared, command)
    output.with_suffix(".md").write_text(tables)
    plot(shared if any(s["runs"] for s in shared.values()) else found, output.with_suffix(".png"))
    return tables


if __name__ == "__main__":
    main()
