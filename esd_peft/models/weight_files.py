"""Weight files of a component's folder, as diffusers or transformers reads them.

All code that checks, hashes, loads, merges or publishes weights uses this module, so that all of it reads the same files.
The libraries differ: in a folder with shards and a whole file, diffusers reads the shards and transformers the whole file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esd_peft.errors import UserError
from esd_peft.io.paths import is_file
from esd_peft.io.text import UnreadableError, read_json


@dataclass(frozen=True)
class _Library:
    stem: str  # of the safetensors files' names
    pickle_stem: str
    prefers_shards: bool


_LIBRARIES = {
    "diffusers": _Library("diffusion_pytorch_model", "diffusion_pytorch_model", prefers_shards=True),
    "transformers": _Library("model", "pytorch_model", prefers_shards=False),
}
SAFE, PICKLED = ".safetensors", ".bin"


@dataclass(frozen=True)
class StoredWeights:
    """The files that hold one component's weights."""

    files: list[Path]
    index: Path | None  # maps each tensor to its file, if there are several
    variant: str | None  # in the files' names

    def plain_name(self, file: Path) -> str:
        """The file's name without the variant: what `from_pretrained` reads by default."""
        return file.name.replace(f".{self.variant}", "", 1) if self.variant else file.name

    def safe_name(self, name: str) -> str:
        """The safetensors name for the name of a pickle."""
        stems = [(library.pickle_stem, library.stem) for library in _LIBRARIES.values()]
        stem, safe = next(pair for pair in stems if name.startswith(pair[0]))
        return name.replace(stem, safe, 1).replace(PICKLED, SAFE, 1)


def library_of(entry: Any) -> str:
    """The library that reads a component, by its entry in `model_index.json`.

    Safety checkers, whose classes lie in a diffusers pipeline's own module, are read by transformers.
    """
    return "diffusers" if isinstance(entry, list) and entry[0] == "diffusers" else "transformers"


def find_weights(folder: Path, library: str, variant: str | None = None, kind: str = SAFE) -> StoredWeights | None:
    """Return the files that `from_pretrained(variant=variant)` of the library reads from `folder`; None if there are none.

    A component without that variant is read from its plain files, as pipelines do. `kind` is `SAFE` or `PICKLED`. Raises
    `UserError` if an index is damaged, names a file outside the folder or one that is missing, and for files that the
    library would read from another place.
    """
    names = _LIBRARIES[library]
    stem = names.stem if kind == SAFE else names.pickle_stem
    if library == "transformers":
        _refuse_detours(folder)
    for name in [variant, None] if variant else [None]:
        mark = f".{name}" if name else ""
        file, index = folder / f"{stem}{mark}{kind}", folder / f"{stem}{kind}.index{mark}.json"
        if name and library == "diffusers" and is_file(old := folder / f"{stem}{kind}{mark}.index.json"):
            raise UserError(f"{old} is an index under a name that diffusers has given up; rename it to {index.name}")
        found = [("file", file)] if is_file(file) else []
        found += [("index", index)] if is_file(index) else []
        if not found:
            continue
        what, path = found[-1 if names.prefers_shards else 0]
        return StoredWeights([path], None, name) if what == "file" else StoredWeights(_shards(path), path, name)
    return None


def needed_weights(folder: Path, library: str, variant: str | None = None) -> StoredWeights:
    """`find_weights` of safetensors files. Raises `UserError`, too, if there are none."""
    if found := find_weights(folder, library, variant):
        return found
    name = f"{_LIBRARIES[library].stem}{SAFE}"
    there = [path.name.removesuffix(SAFE).split(".")[1:] for path in folder.glob(f"*.*{SAFE}")]
    if others := sorted({re.sub(r"-\d+-of-\d+$", "", ".".join(rest)) for rest in there}):
        raise UserError(f"{folder} has no {name}, but one of --variant {others[0]}; add that")
    raise UserError(f"{folder} has no {name}; save the model with safe_serialization=True, or add --allow-pickle")


def weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises `UserError` if the index is damaged."""
    try:
        found: dict[str, str] = read_json(index)["weight_map"]
        if not all(isinstance(name, str) for name in found.values()):
            raise UnreadableError("a file has no name")
        return found
    except (UnreadableError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged; restore it") from None


def _shards(index: Path) -> list[Path]:
    folder, names = index.parent, sorted({*weight_map(index).values()})
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged; restore it")
    there = {path.name for path in folder.iterdir() if is_file(path)}
    for name in names:
        if name not in there:
            raise UserError(f"{folder} lacks the shard {name} that its index names; restore it")
    if len({(folder / name).resolve() for name in names}) < len(names):
        raise UserError(f"{index} names one file several times, through links; restore it")
    return [folder / name for name in names]


def _refuse_detours(folder: Path) -> None:
    """transformers would add an adapter that lies in the folder, and read whatever file its config names."""
    for name, why in _detours(folder):
        raise UserError(f"{folder} {why}, which not every version of transformers reads; merge it, or remove {name}")


def _detours(folder: Path) -> Iterator[tuple[str, str]]:
    if is_file(folder / "adapter_config.json"):
        yield "adapter_config.json", "holds a PEFT adapter"
    try:
        config = read_json(folder / "config.json")
    except UnreadableError:  # the caller reports it
        return
    if isinstance(config, dict) and config.get("transformers_weights"):
        yield "transformers_weights from its config.json", "names other weights"
