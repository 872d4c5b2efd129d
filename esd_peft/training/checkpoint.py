"""Checkpoints of a run, from which `--resume` goes on bit for bit.

Should a resumed run differ, compare what it is made of: the `state_dict` of `Trainer` and of the method's source of batches
(`batch.Source`), the buffer, and what else the bits depend on (`esd_peft.runtime.reproducibility`).

Beside the output `DIR` lies `DIR.checkpoint/`: `step-N.safetensors` with what has been learned and where everything stands,
and `buffer-HASH.safetensors` with the samples it trains on. Each file appears whole (temporary file, fsync, rename), and the
one before goes only then: a kill at any moment leaves a checkpoint to resume from, or none yet. The last one, of what has
been learned, stays until the output is there.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esd_peft.errors import UserError, one_line, system_reason
from esd_peft.io import marks
from esd_peft.io.outputs import empty_folder, new_file, remove_leftovers, take_folder
from esd_peft.io.text import UnreadableError, parse_json
from esd_peft.options.renamed import OLD
from esd_peft.options.training import CheckpointOptions
from esd_peft.runtime import interrupts

SECONDS = 120.0  # between two checkpoints at least: about what a kill may cost
_STEP = re.compile(r"step-\d{8,}\.safetensors")
_BUFFER = re.compile(r"buffer-[0-9a-f]{16}\.safetensors")
_IN_BUFFER = {"inputs", "timesteps", "teacher", "pairs"}
# what may differ between a run and its resumption: it changes nothing in the adapter
_FREE = {
    "output", "overwrite", "resume", "plan", "report_to", "num_validation_images", "validation_prompt", "push_to_hub",
    "memory_budget", "device", "dtype",  # what the last two came to is compared
}  # fmt: skip


@dataclass(frozen=True)
class Left:
    """The remains of a stopped run."""

    training: dict[str, Any] | None = None  # of `TrainingLoop`
    buffer: dict[str, Tensor] | None = None  # none, too, where it is damaged: it is then made anew


class Checkpoints:
    """The checkpoints of one run, which holds its output (`esd_peft.io.jobs`)."""

    def __init__(
        self,
        options: CheckpointOptions,
        config: dict[str, Any],
        base: dict[str, str],
        made_with: dict[str, str] | None = None,
    ) -> None:
        """`config` are the run's options by name, `base` tells the model's files by their hashes, `made_with` what else the
        bits depend on."""
        self.config = self._claimed = _compared(config)
        self.base = base
        self.made_with = {**(made_with or {}), "threads": str(torch.get_num_threads())}
        self.folder = options.output.with_name(f"{options.output.name}.checkpoint")
        self.written = time.monotonic()
        self.made, option = f"the checkpoint of {options.output.name}", f"--output {options.output}:"  # in errors
        take_folder(self.folder, self.made, option=option)
        try:
            self._claim(options)
        except UserError:
            self.__exit__(UserError)
            raise

    def _claim(self, options: CheckpointOptions) -> None:
        for draft in self.folder.glob(".*.draft-*"):  # of a run that was killed
            remove_leftovers(self.folder / draft.name[1:].partition(".draft-")[0])
        for path in self.folder.iterdir():
            if (_STEP.fullmatch(path.name) or _BUFFER.fullmatch(path.name)) and path not in self._own():
                raise UserError(
                    f"--output {options.output}: {self.folder} holds {path.name}, which this run did not write; move it away"
                )
        if not options.resume and options.overwrite:
            self._remove(keep=())
        elif not options.resume and self._steps():
            raise UserError(
                f"--output {options.output}: {self.folder} holds an unfinished run; add --resume to go on, or --overwrite "
                "to start anew"
            )
        elif options.resume and not self._steps():
            raise UserError(f"--resume: {self.folder} holds no checkpoint; leave --resume out to start from the beginning")

    @property
    def step(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return int(max(self._steps()).stem.removeprefix("step-")) if self._steps() else None

    def settings_left(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the options `names` of the run that is resumed, which may have taken less memory than it was given."""
        config = (_read(max(self._steps()))[1] or {}).get("config")
        return {name: config[name] for name in names if isinstance(config, dict) and name in config}

    def goes_on_with(self, config: dict[str, Any]) -> None:
        """The options with which the run that is resumed goes on."""
        self.config = self._claimed = _compared(config)

    def restart_with(self, config: dict[str, Any]) -> bool:
        """The run starts once more, with other options: from the checkpoint that it left, if there is one, as returned."""
        self.config = _compared(config)
        return bool(self._steps())

    def is_due(self) -> bool:
        """Return whether the last one was written long enough ago."""
        return time.monotonic() - self.written >= SECONDS

    def save(
        self,
        step: int,
        training: dict[str, Any],
        buffer: dict[str, Tensor] | None = None,
    ) -> None:
        """Write the state (dicts and lists of tensors and JSON values) as it is after `step` steps, and the buffer if it is
        new.

        The checkpoint before is removed when this one is there. Raises `UserError` if the disk is full.
        """
        buffer_name = None
        if buffer is not None:
            digest = hashlib.sha256(training["source"]["before"].numpy().tobytes()).hexdigest()
            buffer_name = f"buffer-{digest[:16]}.safetensors"
            if not (self.folder / buffer_name).is_file():
                self._write(buffer_name, buffer, {})
        tensors: dict[int, tuple[str, Tensor]] = {}
        values = {"state": _taken_apart(training, tensors), "config": self.config, "base": self.base, "buffer": buffer_name}
        values["made_with"] = self.made_with
        name = f"step-{step:08d}.safetensors"
        self._write(name, dict(tensors.values()), values)
        self._remove(keep=(name, buffer_name))
        self.written = time.monotonic()

    def load(self) -> Left:
        """The newest.

        Raises `UserError` if the checkpoint is damaged, or is of another version, another config, other weights or another
        dtype. Whatever else the bits depend on is said on stderr if it is another.
        """
        path = max(self._steps())
        tensors, values = _read(path)
        if values is None:
            raise UserError(f"--resume: {path} is damaged; remove {self.folder} and start anew")
        of_another_version = UserError(
            f"--resume: {path} was written by another version of esd_peft; resume with that version, or add --overwrite to "
            "start anew"
        )
        try:
            config, base, buffer_name, made_with = (values[key] for key in ("config", "base", "buffer", "made_with"))
            state = _put_together(values["state"], tensors)
            maps = all(isinstance(value, dict) for value in (config, state, made_with))
            older = not maps or not OLD.keys().isdisjoint(config)
            if older or "source" not in state or (buffer_name and not _BUFFER.fullmatch(buffer_name)):
                raise of_another_version
        except (KeyError, TypeError, ValueError, RecursionError):
            raise of_another_version from None
        # an option without a value is left out of either
        every = dict.fromkeys([*self._claimed, *config])
        changed = [key for key in every if config.get(key) != self._claimed.get(key)]
        if changed:
            said = ", ".join(f"{key.replace('_', '-')} was {config.get(key)}" for key in changed)
            raise UserError(f"--resume: the config has changed: {said}; use that, or --overwrite to start anew")
        if base != self.base:
            raise UserError("--resume: the model's files have changed since; restore them, or --overwrite to start anew")
        self._compare(made_with)
        buffer = _read(self.folder / buffer_name)[0] if buffer_name else {}
        return Left(state, buffer if buffer.keys() == _IN_BUFFER else None)

    def _compare(self, before: dict[str, Any]) -> None:
        """Compare with the run that made the checkpoint."""
        dtype = self.made_with.get("dtype")
        if before.get("dtype") != dtype:
            raise UserError(
                f"--resume: the run was computed in {before.get('dtype')}, not in {dtype}; go on with --dtype "
                f"{before.get('dtype')}, or add --overwrite to start anew"
            )
        if others := [name for name, value in self.made_with.items() if before.get(name) != value]:
            was, now = (", ".join(f"{name} {values.get(name)}" for name in others) for values in (before, self.made_with))
            print(
                f"note: --resume: it began with {was} and goes on with {now}: the last bits may be others", file=sys.stderr
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The run is done and needs them no more; or it is not, and they stay, if there are any."""
        if kind is None or not self._steps():
            self._remove(keep=())
            with contextlib.suppress(UserError, OSError):  # somebody put something else there
                empty_folder(self.folder, self.made)

    def _own(self) -> list[Path]:
        """Return the files that this run has written; everything else belongs to somebody."""
        names = marks.recorded(self.folder) or ()
        return [self.folder / name for name in names if isfile(self.folder / name)]

    def _steps(self) -> list[Path]:
        return [path for path in self._own() if _STEP.fullmatch(path.name)]

    def _remove(self, keep: tuple[str | None, ...]) -> None:
        gone = [path for path in self._own() if path.name not in keep]
        for path in gone:
            path.unlink(missing_ok=True)
        marks.drop(self.folder, [path.name for path in gone])

    def _write(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with _writable(self.folder), new_file(self.folder / name) as draft:
            text = json.dumps(values)
            save_file(tensors, draft, {"values": text, "sha256": _digest(tensors, text)})
            _sync(draft)
        _sync(self.folder / marks.MARK)
        _sync(self.folder)  # so that the new name is on the disk before the old file goes


@contextlib.contextmanager
def fitting() -> Iterator[None]:
    """Raise `UserError` if the contents of a checkpoint do not fit inside the block."""
    try:
        yield
    except (UserError, interrupts.InterruptedBetweenSteps, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PyTorch's kinds for a state that is another's are many
        reason = one_line(error)
        raise UserError(f"--resume: the checkpoint does not fit ({reason}); add --overwrite to start anew") from None


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _FREE}


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


def _taken_apart(value: Any, tensors: dict[int, tuple[str, Tensor]]) -> Any:
    """JSON in which tensors are `{"tensor": name}`, and dicts lists of pairs, since their keys may be numbers.

    Tensors are kept once by identity: parameters share the code tables of 8-bit optimizers.
    """
    if isinstance(value, Tensor):
        name, _ = tensors.setdefault(id(value), (f"{len(tensors):05d}", value))
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
        reason = system_reason(error)
        raise UserError(f"--output: {folder} cannot be written: {reason}; free some space or name another") from None
