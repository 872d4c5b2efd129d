"""python -m esd_peft.merge_adapter: base weights + adapter → a plain pipeline without the concept."""

import json
import sys
from pathlib import Path
from typing import Any

from esd_peft._version import __version__
from esd_peft.adapters.export import (
    check_single_file,
    modelspec,
    own_metadata,
    read_checkpoint_denoiser,
    write_checkpoint,
)
from esd_peft.adapters.hub import check_upload
from esd_peft.adapters.merge import RECORD, Changes, base_weights, find_changes, merge_in_place, merge_weight, notes_of
from esd_peft.adapters.model_card import base_licence, model_card, public_config
from esd_peft.adapters.saved import Adapter, read_adapter
from esd_peft.adapters.verify import Verification
from esd_peft.errors import UserError
from esd_peft.io import marks
from esd_peft.io.jobs import lock_output, only_job
from esd_peft.io.outputs import check_new_file, check_output, new_directory, new_file
from esd_peft.io.tensors import check_finite
from esd_peft.io.terminal import say
from esd_peft.models import ModelFamily, open_family
from esd_peft.models.hub_cache import is_snapshot
from esd_peft.models.pipeline_files import copy_pipeline
from esd_peft.models.text_parts import write_for_every_version
from esd_peft.options.command_line import run_command
from esd_peft.options.commands import read_command_line
from esd_peft.options.merge import MergeConfig
from esd_peft.options.model import ModelOptions

MERGED = "a merged model"  # kind of the output


def merge_adapter(config: MergeConfig) -> dict[str, Any]:
    """Merge `config.adapter` into the weights of `config.base` and write the pipeline to `config.output`.

    Weights are read, merged in fp32 and rounded once to the dtype they are stored in, one tensor at a time: the memory
    that this takes does not grow with the model. With `config.verify` each layer is compared with base + adapter, as
    it is on disk, before the output gets its name.

    Returns what `erased.json` holds. Raises `UserError` if the adapter does not fit the base, if a file is damaged,
    if a merged layer differs from base + adapter by more than rounding, or if an upload that was asked for fails.
    """
    with only_job(), lock_output(config.output):
        repository = check_upload(config)
        record = _merge(config)
        if repository is not None:
            repository.upload(config.output)
    return record


def _merge(config: MergeConfig) -> dict[str, Any]:
    _check_output(config, [])
    adapters = [read_adapter(path, scale) for path, scale in zip(config.adapter, config.scales, strict=True)]
    _check_output(config, adapters)
    family = _open_base(config, adapters)
    changes = find_changes(family, adapters)
    for note in notes_of(family, adapters):
        print(f"note: {note}", file=sys.stderr)
    verification = Verification() if config.verify else None
    if config.single_file:
        return _merge_into_file(config, family, adapters, changes, verification)
    with new_directory(config.output, MERGED, config.overwrite, private_as=_private(family)) as draft:
        hashes = {}
        for file, digest, copy in copy_pipeline(family, draft):
            merge_in_place(copy, changes, verification)  # while the page cache still has it
            hashes[file] = digest
        write_for_every_version(draft)
        record = _record(family, adapters, changes, hashes, verification)
        (draft / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(model_card(record, family, adapters, config.output.name), encoding="utf-8")
    return record


def _check_output(config: MergeConfig, adapters: list[Adapter]) -> None:
    """Nothing that is read is replaced, whether an option or an adapter names it."""
    named = [adapter.base.get(name) for adapter in adapters for name in ("model", "checkpoint_config")]
    inputs = [*config.adapter, config.base, config.checkpoint_config, *named]
    if config.single_file:
        check_new_file(config.output, MERGED, config.overwrite, inputs)
    else:
        check_output(config.output, MERGED, config.overwrite, inputs)


def _private(family: ModelFamily) -> list[Path]:
    """A merged model is not for more people than its base's directory; safetensors makes any file private."""
    return [family.path]


def _merge_into_file(
    config: MergeConfig, family: ModelFamily, adapters: list[Adapter], changes: Changes, verification: Verification | None
) -> dict[str, Any]:
    layout = check_single_file(family, config.output)
    hashes = family.denoiser_hashes()
    record = _record(family, adapters, changes, hashes, None)
    record["format"] = "checkpoint file" if layout else 'transformer file, for ComfyUI\'s "Load Diffusion Model"'
    scopes = [adapter.scope for adapter in adapters]
    metadata = modelspec(family, layout, config.output.stem, record["concept"], lora=False) if layout else {}
    metadata |= own_metadata(record["concept"], scopes, record["base"], [adapter.config_sha256 for adapter in adapters])
    metadata[marks.KEY] = MERGED
    licence = base_licence(family.path).get("license")
    with new_file(config.output, _private(family), standalone=True) as draft:
        write_checkpoint(
            draft,
            family,
            lambda name, weight: merge_weight(check_finite(f"--base: {name}", weight), changes.get(name, []))[0],
            metadata | ({"modelspec.license": licence} if licence else {}),
        )
        if verification:
            written = read_checkpoint_denoiser(draft, family)
            for name, base in base_weights(family, changes):
                effect = merge_weight(base, changes[name], verification.inputs(name, base, changes[name]))[1]
                verification.check(name, base, written[name], changes[name], effect)
            record["verification"] = vars(verification)
    return record


def _open_base(config: MergeConfig, adapters: list[Adapter]) -> ModelFamily:
    """The family to merge into. Raises `UserError` if an adapter was trained on another kind."""
    first = adapters[0].base
    if config.base is None and "model" not in first:
        raise UserError(f"--base is missing, and --adapter {config.adapter[0]} does not say what it was trained on")
    options = {name: getattr(config, name) for name in ModelOptions.model_fields}
    if config.base is None:
        options |= {name: options[name] or value for name, value in adapters[0].base_options.items()}
    family = open_family(config.base or first["model"], "--base", ModelOptions(**options))
    kind = family.pipeline_class.__name__
    for adapter in adapters:
        if adapter.base.get("class", kind) != kind:
            raise UserError(
                f"--adapter {adapter.path} was trained on a {adapter.base['class']}; --base {family.path} is a {kind}"
            )
    return family


def _record(
    family: ModelFamily,
    adapters: list[Adapter],
    changes: Changes,
    hashes: dict[str, str],
    verification: Verification | None,
) -> dict[str, Any]:
    return {
        "concept": [name for adapter in adapters for name in adapter.concepts],
        "configs": [public_config(adapter.config) for adapter in adapters],
        "scales": [adapter.scale for adapter in adapters],
        "base": {
            "name": family.name,
            "revision": family.path.name if is_snapshot(family.path) else None,
            "class": family.pipeline_class.__name__,
            "denoiser_sha256": hashes,
            "trained_on_it": all(adapter.base.get("denoiser_sha256") == hashes for adapter in adapters),
        },
        "merged_tensors": len(changes),
        "notes": notes_of(family, adapters),
        "format": "diffusers pipeline",
        **({"verification": vars(verification)} if verification else {}),
        "version": __version__,
    }


def main() -> None:
    """The command line."""
    config = read_command_line(MergeConfig)
    record = merge_adapter(config)
    concepts = ", ".join(record["concept"]) or "the adapter"
    say(f"merged {record['merged_tensors']} tensors: {concepts}")
    if not record["base"]["trained_on_it"]:
        say("note: the adapter was trained on other weights than these; check that the concept is gone")
    if "verification" in record:
        check = record["verification"]
        say(
            f"verified layer by layer: the adapter changes outputs by up to {check['adapter_changes']:.2%}, merged and "
            f"base + adapter differ by at most {check['largest_difference']:.2%} (rounding allows {check['bound']:.2%})"
        )
    say(f"{config.output} is a plain {record['format']}")


if __name__ == "__main__":
    run_command(main)
