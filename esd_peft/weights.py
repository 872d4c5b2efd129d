"""Safetensors files on disk: which ones a component has, their headers and hashes, and edits in place."""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_peft.errors import UserError

NAME = "diffusion_pytorch_model.safetensors"  # what diffusers calls a denoiser's weights
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def component_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` reads the component in `folder` from: one, or the shards its index names.

    Raises `UserError` if there are none, or if the index names a file outside the folder.
    """
    index = folder / f"{NAME}.index.json"
    if (folder / NAME).is_file():
        return [folder / NAME]
    if not index.is_file():
        raise UserError(f"{folder} has no {NAME}; save the model with safe_serialization=True")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is damaged; restore it") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder} lacks the shard {name} that its index names; restore it")
    return [folder / name for name in names]


def sha256(path: Path) -> str:
    """The file's hash, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file. Raises `UserError` if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); restore it") from None


@dataclass
class TensorFile:
    """A safetensors file whose tensors are read and overwritten one at a time, in their own dtype."""

    path: Path
    entries: dict[str, dict[str, Any]]
    start: int  # of the data

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, file: BinaryIO, name: str) -> Tensor:
        """The tensor `name`, as stored."""
        entry = self.entries[name]
        file.seek(self.start + entry["data_offsets"][0])
        count = math.prod(entry["shape"])
        dtype = DTYPES[entry["dtype"]]
        data = bytearray(file.read(count * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])

    def write(self, file: BinaryIO, name: str, value: Tensor) -> None:
        """Put `value` `[same shape]` in the place of `name`, rounded once to the dtype that is there."""
        entry = self.entries[name]
        stored = value.to(DTYPES[entry["dtype"]]).contiguous()
        if list(stored.shape) != entry["shape"]:
            raise ValueError(f"{name} is {entry['shape']}, not {[*stored.shape]}")
        file.seek(self.start + entry["data_offsets"][0])
        file.write(stored.reshape(-1).view(torch.uint8).numpy().tobytes())


def open_tensors(path: Path) -> TensorFile:
    """Read the header. Raises `UserError` if the file is truncated or damaged."""
    try:
        with safe_open(path, framework="pt"):  # checks the header, the offsets and the length
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); restore it") from None
    header.pop("__metadata__", None)
    return TensorFile(path, header, 8 + length)


def file_dtypes(folder: Path) -> set[torch.dtype]:
    """The floating-point dtypes that a component's weights are stored in."""
    entries = [entry for path in component_files(folder) for entry in open_tensors(path).entries.values()]
    return {DTYPES[entry["dtype"]] for entry in entries if entry["dtype"] in DTYPES}
