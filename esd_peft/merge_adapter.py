"""python -m esd_peft.merge_adapter: base weights + adapter → a plain pipeline without the concept."""

import json
from collections.abc import Iterator
from os.path import isfile  # false for a name that is too long, where Path.is_file raises
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_peft._version import __version__
from esd_peft.adapters.deltas import Change
from esd_peft.adapters.export import (
    ONE_TRANSFORMER,
    check_single_file,
    modelspec,
    own_metadata,
    read_checkpoint_denoiser,
    write_checkpoint,
)
from esd_peft.adapters.model_card import base_licence, model_card, public_config
from esd_peft.adapters.options import MergeConfig
from esd_peft.adapters.saved import Adapter, read_adapter
from esd_peft.adapters.verify import Verification
from esd_peft.cli import parse, run_command
from esd_peft.config import EraseConfig, ModelOptions
from esd_peft.errors import UserError
from esd_peft.io.jobs import hold, only_job
from esd_peft.io.outputs import check_new_file, check_output, new_directory, new_file
from esd_peft.io.tensors import check_finite, open_tensors
from esd_peft.io.terminal import say
from esd_peft.models import Backbone, open_backbone
from esd_peft.models.pipeline_files import copy_pipeline
from esd_peft.models.sources import is_snapshot
from esd_peft.models.text_parts import write_for_every_version

RECORD = "erased.json"  # in the merged directory: what was erased, how, and from which base
Changes = dict[str, list[Change]]  # of each weight that changes


def merge_adapter(config: MergeConfig) -> dict[str, Any]:
    """Merge `config.adapter` into the weights of `config.base` and write the pipeline to `config.output`.

    Weights are read, merged in fp32 and rounded once to the dtype they are stored in, one tensor at a time: the memory
    that this takes does not grow with the model. With `config.verify` each layer is compared with base + adapter, as
    it is on disk, before the output gets its name.

    Returns what `erased.json` holds. Raises `UserError` if the adapter does not fit the base, if a file is damaged,
    or if a merged layer differs from base + adapter by more than rounding.
    """
    with only_job(), hold(config.output):
        return _merge(config)


def _merge(config: MergeConfig) -> dict[str, Any]:
    _check_output(config, [])
    adapters = [read_adapter(path, scale) for path, scale in zip(config.adapter, config.scales, strict=True)]
    _check_output(config, adapters)
    backbone = _open_base(config, adapters)
    changes = _changes(backbone, adapters)
    verification = Verification() if config.verify else None
    if config.single_file:
        return _merge_into_file(config, backbone, adapters, changes, verification)
    with new_directory(config.output, config.overwrite, private_as=_private(backbone)) as draft:
        hashes = {}
        for file, digest, copy in copy_pipeline(backbone, draft):
            merge_in_place(copy, changes, verification)  # while the page cache still has it
            hashes[file] = digest
        write_for_every_version(draft)
        record = _record(backbone, adapters, changes, hashes, verification)
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(model_card(record, backbone, adapters, config.output.name), encoding="utf-8")
    return record


def _check_output(config: MergeConfig, adapters: list[Adapter]) -> None:
    """Nothing that is read is replaced, whether an option or an adapter names it."""
    named = [adapter.base.get(name) for adapter in adapters for name in ("model", "checkpoint_config")]
    inputs = [*config.adapter, config.base, config.checkpoint_config, *named]
    if config.single_file:
        check_new_file(config.output, config.overwrite, inputs, own=_is_ours(config.output))
    else:
        check_output(config.output, config.overwrite, inputs)


def _is_ours(file: Path) -> bool:
    """Whether this package wrote that checkpoint: its header says so."""
    if not isfile(file):
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return "esd_peft.version" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _private(backbone: Backbone) -> list[Path]:
    """A merged model is not for more people than its base's directory; safetensors makes any file private."""
    return [backbone.path]


def _merge_into_file(
    config: MergeConfig, backbone: Backbone, adapters: list[Adapter], changes: Changes, verification: Verification | None
) -> dict[str, Any]:
    layout = check_single_file(backbone, config.output)
    hashes = backbone.denoiser_hashes()
    record = _record(backbone, adapters, changes, hashes, None)
    scopes = [adapter.config.get("scope", "") for adapter in adapters]
    metadata = modelspec(backbone, layout, config.output.stem, record["concept"], lora=False) if layout else {}
    metadata |= own_metadata(record["concept"], scopes, record["base"], [adapter.config_sha256 for adapter in adapters])
    licence = base_licence(backbone.path).get("license")
    with new_file(config.output, _private(backbone)) as draft:
        write_checkpoint(
            draft,
            backbone,
            lambda name, weight: merge_weight(check_finite(f"--base: {name}", weight), changes.get(name, []))[0],
            metadata | ({"modelspec.license": licence} if licence else {}),
        )
        if verification:
            written = read_checkpoint_denoiser(draft, backbone)
            for name, base in _base_weights(backbone, changes):
                effect = merge_weight(base, changes[name], verification.inputs(name, base, changes[name]))[1]
                verification.check(name, base, written[name], changes[name], effect)
            record["verification"] = vars(verification)
    return record


def _open_base(config: MergeConfig, adapters: list[Adapter]) -> Backbone:
    """The backbone to merge into. Raises `UserError` if an adapter was trained on another family."""
    first = adapters[0].base
    if config.base is None and not first:
        raise UserError(f"--base is missing, and --adapter {config.adapter[0]} does not say what it was trained on")
    given = {name: getattr(config, name) for name in ModelOptions.model_fields}
    if config.base is None:
        given |= {name: given[name] or value for name, value in adapters[0].base_options.items()}
    backbone = open_backbone(config.base or first.get("model"), "--base", ModelOptions(**given))
    family = backbone.pipeline_class.__name__
    for adapter in adapters:
        if adapter.base.get("class", family) != family:
            raise UserError(
                f"--adapter {adapter.path} was trained on a {adapter.base['class']}; --base {backbone.path} is a {family}"
            )
    return backbone


def _changes(backbone: Backbone, adapters: list[Adapter]) -> Changes:
    """What happens to which weight. Raises `UserError` if the adapters do not fit the base, or each other."""
    changes: Changes = {}
    for adapter in adapters:
        for name, change in adapter.fitting(backbone.empty_denoiser()).items():
            if name in changes and not (change.adds and all(earlier.adds for earlier in changes[name])):
                raise UserError(f"--adapter {adapter.path} replaces weights that another adapter changes; merge it first")
            changes.setdefault(name, []).append(change)
    stored = {name for file in backbone.denoiser_files() for name in open_tensors(file).entries}
    if missing := sorted(changes.keys() - stored):
        raise UserError(f"--adapter {adapters[0].path} does not fit the base: it has no weight {missing[0]}")
    return changes


def _record(
    backbone: Backbone,
    adapters: list[Adapter],
    changes: Changes,
    hashes: dict[str, str],
    verification: Verification | None,
) -> dict[str, Any]:
    return {
        "concept": [name for adapter in adapters for name in erased_concepts(adapter)],
        "configs": [public_config(adapter.config) for adapter in adapters],
        "scales": [adapter.scale for adapter in adapters],
        "base": {
            "name": backbone.name,
            "revision": backbone.path.name if is_snapshot(backbone.path) else None,
            "class": backbone.pipeline_class.__name__,
            "denoiser_sha256": hashes,
            "trained_on_it": all(adapter.base.get("denoiser_sha256") == hashes for adapter in adapters),
        },
        "merged_tensors": len(changes),
        **({"verification": vars(verification)} if verification else {}),
        "version": __version__,
    }


def erased_concepts(adapter: Adapter) -> list[str]:
    """The concepts that the adapter erases; none where another tool made it."""
    fields: dict[str, Any] = {key: adapter.config.get(key) for key in ("concept", "erase_from")}
    return EraseConfig(**fields).concept_names if fields["concept"] else []


@torch.no_grad()
def merge_weight(weight: Tensor, changes: list[Change], inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A base weight with all its changes, fp32 from the first on, and what these add to the outputs for `inputs`."""
    effect = torch.zeros(())
    for change in changes:
        adapted = change.on(weight)
        if inputs is not None:
            effect = effect + adapted.effect(inputs)
        weight = adapted.merge()
    return weight, effect


def merge_in_place(path: Path, changes: Changes, verification: Verification | None) -> None:
    """Overwrite the tensors that change in the file, and read each back to be verified."""
    tensors = open_tensors(path)
    with path.open("r+b") as file:
        for name in [name for name in changes if name in tensors]:
            base = tensors.read(file, name)
            check_finite(f"--base: {name}", base)
            inputs = verification.inputs(name, base, changes[name]) if verification else None
            merged, effect = merge_weight(base, changes[name], inputs)
            tensors.write(file, name, merged)
            if verification:
                verification.check(name, base, tensors.read(file, name), changes[name], effect)


def _base_weights(backbone: Backbone, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    for path in backbone.denoiser_files():
        tensors = open_tensors(path)
        with path.open("rb") as file:
            yield from ((name, tensors.read(file, name)) for name in changes if name in tensors)


def main() -> None:
    """The command line."""
    config = parse(MergeConfig, "merge_adapter")
    record = merge_adapter(config)
    concepts = ", ".join(record["concept"]) or "the adapter"
    say(f"merged {record['merged_tensors']} tensors: {concepts}")
    if not record["base"]["trained_on_it"]:
        say("note: the adapter was trained on other weights than these; check that the concept is gone")
    if "verification" in record:
        found = record["verification"]
        say(
            f"verified layer by layer: the adapter changes outputs by up to {found['adapter_changes']:.2%}, merged and "
            f"base + adapter differ by at most {found['largest_difference']:.2%} (rounding allows {found['bound']:.2%})"
        )
    kind = "diffusers pipeline"
    if config.single_file:
        alone = record["base"]["class"] in ONE_TRANSFORMER
        kind = 'transformer file, for ComfyUI\'s "Load Diffusion Model"' if alone else "checkpoint file"
    say(f"{config.output} is a plain {kind}")


if __name__ == "__main__":
    run_command(main)
