"""Options of the release before this one: under their new names, or refused; to be removed with the next release."""

import sys
from collections.abc import Mapping
from typing import Any

from esd_peft.errors import UserError
from esd_peft.options.base import flag

_TRUE = (True, "True", "true", "yes")
_NONE = (None, 0, "0")  # max_train_steps 0 meant that nothing followed --attention-steps


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` under the names of today's options, and say on stderr what has another name now.

    Raises `UserError` for an option that is gone.
    """
    for name in values:
        _check_there(name)
    made = {**values}
    for old in [name for name in _NEW if name in made]:
        new = _NEW[old](made.pop(old))
        if new.get("max_train_steps") and made.get("max_train_steps") not in _NONE:
            raise UserError(
                f"{flag(old)} is now --method layers --max-train-steps, and two stages are gone; leave one of them out"
            )
        made |= {name: value for name, value in new.items() if made.get(name) in _NONE}
        said = " ".join(f"{flag(name)} {value}" for name, value in new.items())
        print(f"note: {flag(old)} is now {said or 'not needed'}", file=sys.stderr)
    return made


def rename_arguments(argv: list[str]) -> list[str]:
    """Do the same for a command line."""
    known = {flag(name): name for name in (*_NEW, "method", "max_train_steps")}
    rest: list[str] = []
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            _check_there(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
        if name in known:
            given[known[name]] = value if has_value else next(words, "")
        else:
            rest.append(word)
    if not given.keys() & _NEW.keys():
        return argv
    return [*rest, *(f"{flag(name)}={value}" for name, value in renamed(given).items())]


def _attention_steps(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not str(value).isdecimal():
        raise UserError(f"--attention-steps is now --method layers --max-train-steps, a whole number, and not {value!r}")
    return {"method": "layers", "max_train_steps": int(value)} if int(value) else {"method": "trajectories"}


def _augment_prompts(value: Any) -> dict[str, Any]:
    return {"method": "denoiser"} if value in _TRUE else {}


def _objective(value: Any) -> dict[str, Any]:
    return {"method": "contrastive"} if value == "contrastive" else {}


def _robust(value: Any) -> dict[str, Any]:
    if value in (0, "0", None):
        return {}
    raise UserError(
        "--robust is gone: --method denoiser withstands textual inversion better, and spares more (docs/attacks.md)"
    )


_NEW = {  # where two of them name a method, the first does
    "objective": _objective,
    "augment_prompts": _augment_prompts,
    "attention_steps": _attention_steps,
    "robust": _robust,
}
_GONE = {  # and what to do instead
    "lr_warmup_steps": "leave it out, or take a lower --learning-rate",
    "snr_gamma": "leave it out; all timesteps count alike",
    "min_timestep": "leave it out; all timesteps of a trajectory are trained on",
    "max_timestep": "leave it out; all timesteps of a trajectory are trained on",
    "stop_at": "use --max-train-steps",
    "max_grad_norm": "leave it out, or take a lower --learning-rate",
}
OLD: Mapping[str, str] = {
    **dict.fromkeys(_NEW, "it is now part of --method; write the config anew"),
    **{name: f"it is gone; {instead}" for name, instead in _GONE.items()},
}


def _check_there(name: str) -> None:
    if name in _GONE:
        raise UserError(f"{flag(name)} is gone; {_GONE[name]}")
