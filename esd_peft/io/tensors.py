"""Safetensors files on disk: their headers and hashes, and edits in place."""

import hashlib
import json
import math
import re
import shutil
import struct
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esd_peft.errors import UserError
from esd_peft.io.paths import exists, is_file, reading
from esd_peft.io.text import UnreadableError, parse_json

CHUNK = 2**18  # bytes; 1 MiB took nearly three times the processor time
_SCALE = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale(_inv|_2)?|input_scale|comfy_quant)$")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def check_finite(name: str, value: Tensor) -> Tensor:
    """Return `value`. Raises `UserError` if it has a NaN or infinity; `name` is for the message."""
    if not (value.is_floating_point() and value.numel()):
        return value
    extremes = torch.aminmax(value if value.itemsize > 1 else value.float())  # NaN if one of the values is
    if not all(extreme.isfinite() for extreme in extremes):
        raise UserError(f"{name} holds a value that is not a number, or infinite; restore its file")
    return value


def is_unscaled(dtype: torch.dtype, name: str) -> bool:
    """Return whether a tensor of that dtype and name holds plain values: floats of 16 bits or more, or positions."""
    return (dtype.is_floating_point and dtype.itemsize > 1) or name.endswith("position_ids")


def is_scale(name: str) -> bool:
    """Return whether a tensor of that name scales 8-bit weights, or marks them as scaled."""
    return _SCALE.search(name) is not None


def check_regular(path: Path) -> None:
    """Raise `UserError` for a pipe or device, which would be read without end; missing files are reported later."""
    if exists(path) and not is_file(path):
        raise UserError(f"{path} is no regular file; restore it")


def sha256(path: Path) -> str:
    """The file's hash, in hex. Raises `UserError` if it cannot be read."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_with_sha256(source: Path, target: Path) -> str:
    """Copy a file and return its hash, in hex: one read for both, hashed beside the copying.

    Raises `UserError` if it cannot be read.
    """
    digest = hashlib.sha256()
    buffers = deque(memoryview(bytearray(CHUNK)) for _ in range(4))
    hashing: deque[Future[None]] = deque()
    with reading(source):
        opened = source.open("rb", buffering=0)
    with opened as old, target.open("wb") as new, ThreadPoolExecutor(1) as hasher:
        while count := old.readinto(buffers[0]):
            part = buffers[0][:count]
            hashing.append(hasher.submit(digest.update, part))
            new.write(part)
            buffers.rotate(-1)
            if len(hashing) == len(buffers):  # the next buffer is still being hashed
                hashing.popleft().result()
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of one file. Raises `UserError` if it is truncated or damaged."""
    check_regular(path)
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
        if entry["dtype"] not in DTYPES:
            kind = entry["dtype"]
            raise UserError(f"{self.path} stores {name} as {kind}, too coarse to merge into; use the 16- or 32-bit weights")
        dtype = DTYPES[entry["dtype"]]
        return torch.frombuffer(self.read_bytes(file, name), dtype=dtype).reshape(entry["shape"])

    def read_bytes(self, file: BinaryIO, name: str) -> bytearray:
        """The bytes of the tensor `name`, whatever its dtype."""
        first, end = self.entries[name]["data_offsets"]
        file.seek(self.start + first)
        content = bytearray(end - first)
        del content[cast(BufferedReader, file).readinto(content) :]  # the file was cut short since its header was read
        return content

    def write(self, file: BinaryIO, name: str, value: Tensor) -> None:
        """Put `value` `[same shape]` in the place of `name`, rounded once to the dtype that is there."""
        entry = self.entries[name]
        stored = value.to(DTYPES[entry["dtype"]]).contiguous()
        if list(stored.shape) != entry["shape"]:
            raise ValueError(f"{name} is {entry['shape']}, not {[*stored.shape]}")
        file.seek(self.start + entry["data_offsets"][0])
        file.write(as_bytes(stored))


def as_bytes(tensor: Tensor) -> bytes:
    """A contiguous tensor as safetensors stores it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def open_tensors(path: Path) -> TensorFile:
    """Read the header. Raises `UserError` if the file is truncated or damaged."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt"):  # checks the header, the offsets and the length
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = parse_json(file.read(length))
    except (SafetensorError, UnreadableError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); restore it") from None
    header.pop("__metadata__", None)
    return TensorFile(path, header, 8 + length)


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written, and where its bytes come from."""

    name: str
    dtype: str  # as safetensors names it
    shape: list[int]
    size: int  # bytes
    read: Callable[[], bytes | bytearray]


def write_tensors(path: Path, tensors: list[NewTensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file one tensor at a time; `modelspec.hash_sha256` of the data is added to the metadata."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, "modelspec.hash_sha256": "0x" + 64 * "0"}}
    end = 0
    # wide numbers first, as the library does: every tensor starts where its dtype may
    tensors = sorted(tensors, key=lambda t: (-t.size // max(1, math.prod(t.shape)), t.name))
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.size]}
        end += tensor.size
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(_header(header))
        for tensor in tensors:
            data = tensor.read()
            digest.update(data)
            file.write(data)
        header["__metadata__"]["modelspec.hash_sha256"] = "0x" + digest.hexdigest()
        file.seek(0)
        file.write(_header(header))  # of the same length


def add_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Add to the metadata of a small safetensors file; its tensors stay unchanged.

    In a fixed order: safetensors has another one each time, and the same run makes the same bytes.
    """
    tensors = open_tensors(path)
    with safe_open(path, framework="pt") as file:
        old_metadata = file.metadata() or {}
    data = path.read_bytes()[tensors.start :]
    path.write_bytes(_header({"__metadata__": dict(sorted((old_metadata | metadata).items())), **tensors.entries}) + data)


def rename_tensors(path: Path, rename: Callable[[str], str]) -> None:
    """Rename the tensors of a safetensors file of any size; without changes the file stays untouched."""
    tensors = open_tensors(path)
    if all(rename(name) == name for name in tensors.entries):
        return
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    renamed = path.with_name(f"{path.name}.renamed")
    with path.open("rb") as old, renamed.open("wb") as new:
        new.write(_header({"__metadata__": metadata, **{rename(name): entry for name, entry in tensors.entries.items()}}))
        old.seek(tensors.start)
        shutil.copyfileobj(old, new, 2**20)
    shutil.copymode(path, renamed)
    renamed.replace(path)


def _header(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
