"""Merging adapters into their base, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from esd_peft.adapters.deltas import WeightDelta
from esd_peft.adapters.saved import Adapter
from esd_peft.adapters.verify import Verification
from esd_peft.errors import UserError
from esd_peft.io.tensors import check_finite, open_tensors
from esd_peft.models import ModelFamily

RECORD = "erased.json"  # in the merged directory: concepts, config and base
Changes = dict[str, list[WeightDelta]]  # of each weight that changes


def find_changes(family: ModelFamily, adapters: list[Adapter]) -> Changes:
    """Collect the changes of each weight.

    Raises `UserError` if an adapter does not fit the base or the other adapters, or changes nothing.
    """
    changes: Changes = {}
    own: dict[Adapter, dict[str, WeightDelta]] = {adapter: {} for adapter in adapters}
    owner: dict[str, Adapter] = {}  # of each weight an adapter that does not add to it
    for adapter in adapters:
        for name, change in adapter.fitting(family.empty_denoiser()).items():
            if not change.adds:
                owner.setdefault(name, adapter)
            if name in changes and name in owner:
                raise UserError(
                    f"--adapter {owner[name].path} replaces weights that another adapter changes; merge it first, and the "
                    "other one into what comes out (--base)"
                )
            changes.setdefault(name, []).append(change)
            own[adapter][name] = change
    stored = {name for file in family.denoiser_files() for name in open_tensors(file).entries}
    if missing := sorted(changes.keys() - stored):
        raise UserError(f"--adapter {adapters[0].path} does not fit the base: it has no weight {missing[0]}")
    for adapter in adapters:
        _check_acts(family, adapter, own[adapter])
    return changes


def notes_of(family: ModelFamily, adapters: list[Adapter]) -> list[str]:
    """Return notes on the adapters' files, one sentence each."""
    return [note for adapter in adapters for note in adapter.notes(family.empty_denoiser())]


@torch.no_grad()
def merge_weight(
    weight: Tensor, changes: list[WeightDelta], inputs: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return a base weight with all its changes, rounded once to `dtype` after the last, and their contribution to the
    outputs for `inputs`; a weight without changes stays as it is.

    Several changes are added as differences from the base, W + Σ (W_i − W), so their order does not matter. For LoRA and
    other additive adapters this equals PEFT with all of them active; for DoRA it does up to products of changes.
    """
    effect, merged = torch.zeros(()), weight
    for change in changes:
        adapted = change.on(weight)
        if inputs is not None:
            effect = effect + adapted.effect(inputs)
        if len(changes) == 1:
            return adapted.merge(dtype), effect
        merged = merged.float() + (adapted.merge() - weight.float())
    return merged.to(dtype) if changes else merged, effect


@torch.no_grad()
def _check_acts(family: ModelFamily, adapter: Adapter, changes: dict[str, WeightDelta]) -> None:
    """Raise `UserError` unless a weight is another one after the merge, as it is stored; reads up to the first that is."""
    for name, base in base_weights(family, {name: [change] for name, change in changes.items()}):
        check_finite(f"--base: {name}", base)
        if not torch.equal(changes[name].on(base).merge(base.dtype), base):
            return
    raise UserError(
        f"--adapter {adapter.path} changes nothing: all {len(changes)} weights that it is for stay as they are stored; "
        "train it, or restore its files"
    )


def merge_in_place(path: Path, changes: Changes, verification: Verification | None) -> None:
    """Overwrite the tensors that change in the file, and read each back to be verified."""
    tensors = open_tensors(path)
    with path.open("r+b") as file:
        for name in [name for name in changes if name in tensors]:
            base = tensors.read(file, name)
            check_finite(f"--base: {name}", base)
            inputs = verification.inputs(name, base, changes[name]) if verification else None
            merged, effect = merge_weight(base, changes[name], inputs, base.dtype)
            tensors.write(file, name, merged)
            if verification:
                verification.check(name, base, tensors.read(file, name), changes[name], effect)


def base_weights(family: ModelFamily, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    """The weights that change, as the base has them."""
    for path in family.denoiser_files():
        tensors = open_tensors(path)
        with path.open("rb") as file:
            yield from ((name, tensors.read(file, name)) for name in changes if name in tensors)
