"""What a run has so far, on disk, so that `--resume` goes on from there, bit for bit.

Beside the output `DIR` lies `DIR.checkpoint/`: `step-N.safetensors` with what has been learned and where everything stands,
and `bank-HASH.safetensors` with the tuples it trains on. Each file appears whole (temporary file, fsync, rename), and the
one before goes only then: a kill at any moment leaves a checkpoint to resume from, or none yet.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esd_peft import locks
from esd_peft.config import EraseConfig
from esd_peft.errors import UserError
from esd_peft.outputs import new_file
from esd_peft.text_files import UnreadableError, parse_json

_BANK = re.compile(r"bank-[0-9a-f]{16}\.safetensors")
# what may differ between a run and its resumption: it changes nothing in the adapter
_FREE = {"output", "overwrite", "resume", "plan", "checkpoint_every", "report_to", "eval_seeds", "memory_budget"}


class Checkpoints:
    """The checkpoints of one run; one process at a time has them."""

    def __init__(self, config: EraseConfig, base: dict[str, str]) -> None:
        """`base` tells the model's files by their hashes. Raises `UserError` if another run holds them."""
        self.config = self._claimed = _compared(config)
        self.base = base
        self.folder = config.output.with_name(f"{config.output.name}.checkpoint")
        self.every = config.checkpoint_every
        self._held = contextlib.ExitStack()
        with _writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").touch()
            try:
                self._held.enter_context(locks.hold(self.folder / "lock"))
            except BlockingIOError:
                raise UserError(f"--output {config.output}: another run is writing there; name another directory") from None
        try:
            self._claim(config)
        except UserError:
            self.__exit__(UserError)
            raise

    def _claim(self, config: EraseConfig) -> None:
        for draft in self.folder.glob(".*.draft-*"):  # of a run that was killed: no other one has the lock
            shutil.rmtree(draft, ignore_errors=True)
        if not config.resume and config.overwrite:
            self._remove(keep=())
        elif not config.resume and self._steps():
            raise UserError(
                f"--output {config.output}: {self.folder} holds an unfinished run; add --resume to go on, or --overwrite to "
                "start anew"
            )
        elif config.resume and not self._steps():
            raise UserError(f"--resume: {self.folder} holds no checkpoint; leave --resume out to start from the beginning")

    def hand_over(self, config: EraseConfig) -> EraseConfig:
        """The run starts once more, with the settings of `config`: as returned, from the checkpoint that it left, if any."""
        self.config = _compared(config)
        return config.model_copy(update={"resume": bool(self._steps())})

    def save(self, step: int, state: dict[str, Any], bank: dict[str, Tensor] | None) -> None:
        """Write `state` (dicts and lists of tensors and JSON values) as it is after `step`, and the bank if it is new.

        The checkpoint before is removed when this one is there. Raises `UserError` if the disk is full.
        """
        bank_name = None
        if bank is not None:
            bank_name = f"bank-{hashlib.sha256(bank['after'].numpy().tobytes()).hexdigest()[:16]}.safetensors"
            if not (self.folder / bank_name).is_file():
                self._write(bank_name, bank, {})
        tensors: dict[str, Tensor] = {}
        values = {"state": _taken_apart(state, tensors), "config": self.config, "base": self.base, "bank": bank_name}
        name = f"step-{step:08d}.safetensors"
        self._write(name, tensors, values)
        self._remove(keep=(name, bank_name))

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """The newest state, and its bank, none where that is damaged (it is then made anew).

        Raises `UserError` if the checkpoint is damaged, or is of another config or other weights.
        """
        path = max(self._steps())
        tensors, values = _read(path)
        damaged = UserError(f"--resume: {path} is damaged; remove {self.folder} and start anew")
        try:
            config, base, bank_name = values["config"], values["base"], values["bank"]
            state = _put_together(values["state"], tensors)
            if not isinstance(config, dict) or not isinstance(state, dict) or (bank_name and not _BANK.fullmatch(bank_name)):
                raise damaged
        except (KeyError, TypeError, ValueError, RecursionError):
            raise damaged from None
        changed = [key for key, value in self._claimed.items() if config.get(key) != value]
        if changed:
            said = ", ".join(f"{key.replace('_', '-')} was {config.get(key)}" for key in changed)
            raise UserError(f"--resume: the config has changed: {said}; use that, or --overwrite to start anew")
        if base != self.base:
            raise UserError("--resume: the model's files have changed since; restore them, or --overwrite to start anew")
        bank = _read(self.folder / bank_name)[0] if bank_name else None
        return state, bank or None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The run is done and needs them no more; or it is not, and they stay, if there are any."""
        if kind is None or not self._steps():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def _steps(self) -> list[Path]:
        return [*self.folder.glob("step-*.safetensors")]

    def _remove(self, keep: tuple[str | None, ...]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def _write(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with _writable(self.folder), new_file(self.folder / name) as draft:
            text = json.dumps(values)
            save_file(tensors, draft, {"values": text, "sha256": _digest(tensors, text)})
            _sync(draft)
        _sync(self.folder)  # so that the new name is on the disk before the old file goes


def _compared(config: EraseConfig) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if k not in _FREE}


def _read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and values of a file; nothing and none if it is not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            header = file.metadata()
        if header["sha256"] == _digest(tensors, header["values"]):
            return tensors, parse_json(header["values"])
    except (SafetensorError, UnreadableError, OSError, ValueError, KeyError, TypeError):
        pass
    return {}, None


def _digest(tensors: dict[str, Tensor], values: str = "") -> str:
    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {[*tensors[name].shape]}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON in which tensors are `{"tensor": name}`, and dicts lists of pairs, since their keys may be numbers."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"pairs": [[key, _taken_apart(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_taken_apart(item, tensors) for item in value]
    return value


def _put_together(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _put_together(item, tensors) for key, item in value["pairs"]}
    return [_put_together(item, tensors) for item in value] if isinstance(value, list) else value


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output: {folder} cannot be written: {error.strerror}; free some space or name another") from None
