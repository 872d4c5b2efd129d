"""python -m esd_peft.merge_adapter: base weights + adapter → a plain diffusers directory without the concept."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from esd_peft import __version__
from esd_peft.backbones import Backbone, open_backbone
from esd_peft.command_line import parse
from esd_peft.config import EraseConfig, MergeConfig
from esd_peft.errors import UserError, run_command
from esd_peft.outputs import check_output, new_directory
from esd_peft.randomness import generator
from esd_peft.saved_adapters import Adapter, Change, read_adapter
from esd_peft.weights import NAME, component_files, file_dtypes, open_tensors, sha256

RECORD = "erased.json"  # in the merged directory: what was erased, how, and from which base


def merge_adapter(config: MergeConfig) -> dict[str, Any]:
    """Merge `config.adapter` into the weights of `config.base` and write the pipeline to `config.output`.

    Weights are read, merged in fp32 and rounded once to the dtype they are stored in, one tensor at a time. With
    `config.verify` (which loads the denoiser) the result is compared with base + adapter before it gets its name.

    Returns what `erased.json` holds. Raises `UserError` if the adapter does not fit the base, if a file is damaged,
    or if the merged denoiser differs from base + adapter by more than rounding.
    """
    check_output(config.output, config.overwrite, [*config.adapter, *([Path(config.base)] if config.base else [])])
    adapters = [read_adapter(path) for path in config.adapter]
    first = adapters[0].base
    base = config.base if config.base is not None else first.get("model")
    if base is None and not first:
        raise UserError(f"--base is missing, and --adapter {config.adapter[0]} does not say what it was trained on")
    backbone = open_backbone(base, "--base")
    files = component_files(backbone.path / backbone.denoiser_part)
    hashes = {file.name: sha256(file) for file in files}
    same = all(adapter.base.get("denoiser_sha256") == hashes for adapter in adapters)
    record: dict[str, Any] = {
        "concept": [name for adapter in adapters for name in erased_concepts(adapter)],
        "configs": [adapter.config for adapter in adapters],
        "base": {"class": backbone.pipeline_class.__name__, "denoiser_sha256": hashes, "trained_on_it": same},
        "version": __version__,
    }
    with new_directory(config.output, config.overwrite) as draft:
        copy_pipeline(backbone, draft)
        record["merged_tensors"] = merge_into(backbone, draft / backbone.denoiser_part, adapters)
        if config.verify:
            record["verification"] = verify(backbone, draft, adapters)
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def erased_concepts(adapter: Adapter) -> list[str]:
    """The concepts that the adapter erases; none where another tool made it."""
    fields: dict[str, Any] = {key: adapter.config.get(key) for key in ("concept", "erase_from")}
    return EraseConfig(**fields).concept_names if fields["concept"] else []


def copy_pipeline(backbone: Backbone, target: Path) -> None:
    """Copy what `from_pretrained` reads by default.

    Other variants of the denoiser's weights, and single-file checkpoints in the root, still hold the concept: they
    stay behind.
    """
    shutil.copyfile(backbone.path / "model_index.json", target / "model_index.json")
    for licence in backbone.path.glob("LICENSE*"):
        shutil.copyfile(licence, target / licence.name)
    folders = [name for name, part in backbone.index.items() if isinstance(part, list) and part[0] is not None]
    for name in folders:
        source = backbone.path / name
        if name == backbone.denoiser_part:
            (target / name).mkdir()
            extra = [p for p in (source / "config.json", source / f"{NAME}.index.json") if p.is_file()]
            for file in [*extra, *component_files(source)]:
                shutil.copyfile(file, target / name / file.name)
        elif source.is_dir():
            shutil.copytree(source, target / name, copy_function=shutil.copyfile)


def merge_into(backbone: Backbone, folder: Path, adapters: list[Adapter]) -> int:
    """Overwrite the tensors that the adapters change in the files of `folder`; returns how many there were."""
    changes: dict[str, list[Change]] = {}
    for adapter in adapters:
        for name, change in adapter.changes(backbone.empty_denoiser()).items():
            if name in changes and not adapter.adds:
                raise UserError(f"--adapter {adapter.path} replaces weights that another adapter changes; merge it first")
            changes.setdefault(name, []).append(change)
    count = len(changes)
    for path in component_files(folder):
        tensors = open_tensors(path)
        here = [name for name in changes if name in tensors]
        with path.open("r+b") as file:
            for name in here:
                merged = tensors.read(file, name)
                for change in changes.pop(name):  # in fp32 from the first on
                    merged = change(merged)
                tensors.write(file, name, merged)
    if changes:
        raise UserError(f"--adapter {adapters[0].path} does not fit the base: it has no weight {next(iter(changes))}")
    return count


@torch.no_grad()
def verify(backbone: Backbone, merged: Path, adapters: list[Adapter]) -> dict[str, float]:
    """One fp32 forward pass of base + adapter and of the merged denoiser: the largest differences.

    Raises `UserError` if they differ by more than what rounding the merged weights explains.
    """
    said = [
        name for adapter in adapters for name in erased_concepts(adapter)
    ]  # where the adapter acts, and not on much else
    embeds = backbone.encode([said[0] if said else "a picture"], torch.device("cpu"), torch.float32)
    denoiser = backbone.load_denoiser(torch.float32)
    noise = generator(0, "verify")
    latents = backbone.initial_latents(1, denoiser, noise)
    timestep = torch.tensor([500])
    plain = backbone.predict(denoiser, latents, timestep, embeds)
    for adapter in adapters:
        denoiser = adapter.apply(denoiser)
    adapted = backbone.predict(denoiser, latents, timestep, embeds)
    del denoiser
    result = open_backbone(str(merged), "--output")
    seen = result.predict(result.load_denoiser(torch.float32), latents, timestep, embeds)
    difference, size = (seen - adapted).abs().max().item(), adapted.abs().max().item()
    stored = max(file_dtypes(merged / backbone.denoiser_part), key=lambda dtype: torch.finfo(dtype).eps)
    # a weight is rounded by at most eps / 2; fp32 sums in another order differ by more than fp32's eps
    bound = max(4 * torch.finfo(stored).eps, 1e-4) * size
    if not difference <= bound:
        raise UserError(
            f"--adapter {adapters[-1].path}: the merged denoiser differs from base + adapter by {difference:.3g}, more than "
            f"rounding to {stored} explains ({bound:.3g}); nothing was written"
        )
    return {"adapter_changes": (adapted - plain).abs().max().item(), "largest_difference": difference, "bound": bound}


def main() -> None:
    """The command line."""
    config = parse(MergeConfig, "merge_adapter")
    record = merge_adapter(config)
    concepts = ", ".join(record["concept"]) or "the adapter"
    print(f"merged {record['merged_tensors']} tensors: {concepts}")
    if not record["base"]["trained_on_it"]:
        print("note: the adapter was trained on other weights than these; check that the concept is gone")
    if "verification" in record:
        found = record["verification"]
        print(
            f"verified: the adapter changes a prediction by up to {found['adapter_changes']:.3g}; merged and "
            f"base + adapter differ by at most {found['largest_difference']:.2g} (rounding allows {found['bound']:.2g})"
        )
    print(f"{config.output} is a plain diffusers pipeline")


if __name__ == "__main__":
    run_command(main)
