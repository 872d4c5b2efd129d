"""How adapters change the weights of their base, one tensor at a time."""

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

RECORD = "erased.json"  # in the merged directory: what was erased, how, and from which base
Changes = dict[str, list[WeightDelta]]  # of each weight that changes


def find_changes(family: ModelFamily, adapters: list[Adapter]) -> Changes:
    """What happens to which weight. Raises `UserError` if the adapters do not fit the base, or each other."""
    changes: Changes = {}
    for adapter in adapters:
        for name, change in adapter.fitting(family.empty_denoiser()).items():
            if name in changes and not (change.adds and all(earlier.adds for earlier in changes[name])):
                raise UserError(f"--adapter {adapter.path} replaces weights that another adapter changes; merge it first")
            changes.setdefault(name, []).append(change)
    stored = {name for file in family.denoiser_files() for name in open_tensors(file).entries}
    if missing := sorted(changes.keys() - stored):
        raise UserError(f"--adapter {adapters[0].path} does not fit the base: it has no weight {missing[0]}")
    return changes


@torch.no_grad()
def merge_weight(weight: Tensor, changes: list[WeightDelta], inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
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


def base_weights(family: ModelFamily, changes: Changes) -> Iterator[tuple[str, Tensor]]:
    """The weights that change, as the base has them."""
    for path in family.denoiser_files():
        tensors = open_tensors(path)
        with path.open("rb") as file:
            yield from ((name, tensors.read(file, name)) for name in changes if name in tensors)
