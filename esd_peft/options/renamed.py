"""Options of the release before this one: under their new names, or refused; to be removed with the next release."""

import sys
from collections.abc import Mapping
from typing import Any

from esd_peft.errors import UserError
from esd_peft.options.base import flag

_TRUE = (True, "True", "true", "yes")
_TODAY = ("method", "max_train_steps", "rollout", "closed_form", "push_to_hub")  # what these are now
_NONE = (None, 0, "0")  # max_train_steps 0 meant that nothing followed --attention-steps


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` under the names of today's options, and say on stderr what has another name now.

    Raises `UserError` for an option that is gone.
    """
    for name in values:
        _check_there(name)
    made = {**values}
    if made.get("push_to_hub") is True and made.pop("push_to_hub") and made.get("hub_model_id") is None:
        raise UserError("--push-to-hub now takes the repository, as OWNER/NAME; name it")
    for old in [name for name in _NEW if name in made]:
        new = _NEW[old](made.pop(old))
        if new.get("max_train_steps") and made.get("max_train_steps") not in _NONE:
            raise UserError(
                f"{flag(old)} is now --method layers --max-train-steps, and two stages are gone; leave one of them out"
            )
        if new.get("closed_form") is False and made.get("closed_form") in _TRUE:
            raise UserError(f"{flag(old)} is now --closed-form False, and --closed-form True says otherwise; leave one out")
        new = {name: value for name, value in new.items() if made.get(name) in _NONE}
        made |= new
        said = " ".join(f"{flag(name)} {value}" for name, value in new.items())
        print(f"note: {flag(old)} is now {said or 'not needed'}", file=sys.stderr)
    return made


def rename_arguments(argv: list[str]) -> list[str]:
    """Do the same for a command line."""
    known = {flag(name): name for name in (*_NEW, *_TODAY)}
    rest: list[str] = []
    given: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if name.startswith("--"):
            _check_there(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
        if word == "--push-to-hub" and any(other.startswith("--hub-model-id") for other in argv):
            continue  # it had no value, and that one is it now
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


def _guided_rollout_ratio(value: Any) -> dict[str, Any]:
    if _is_zero(value):
        return {"rollout": "teacher"}
    raise UserError("--guided-rollout-ratio is gone; use --rollout mixed, in which the guided target drives half of them")


def _null_space(value: Any) -> dict[str, Any]:
    if _is_zero(value):
        return {"closed_form": False}
    raise UserError("--null-space is gone; use --closed-form True, which has one of 0.999, and of 0.99 with --erase-from")


def _hub_model_id(value: Any) -> dict[str, Any]:
    return {} if value is None else {"push_to_hub": value}


def _is_zero(value: Any) -> bool:
    try:
        return float(value) == 0
    except (TypeError, ValueError):
        return False


_NEW = {  # where two of them name a method, the first does
    "objective": _objective,
    "augment_prompts": _augment_prompts,
    "attention_steps": _attention_steps,
    "robust": _robust,
    "guided_rollout_ratio": _guided_rollout_ratio,
    "null_space": _null_space,
    "hub_model_id": _hub_model_id,
}
_GONE = {  # and what to do instead
    "lr_warmup_steps": "leave it out, or take a lower --learning-rate",
    "snr_gamma": "leave it out; all timesteps count alike",
    "min_timestep": "leave it out; all timesteps of a trajectory are trained on",
    "max_timestep": "leave it out; all timesteps of a trajectory are trained on",
    "stop_at": "use --max-train-steps",
    "preservation_trajectories": "leave it out; there is one for each --preserve prompt",
    "preserve_file": "list the prompts under preserve in the YAML file of --config",
    "reference": "leave it out; the teacher makes the images",
    "validation_steps": "leave it out; each fifth of the steps is looked at",
    "evaluate": "run python -m esd_peft.evaluate --erased OUTPUT",
    "checkpointing_steps": "leave it out; a checkpoint is written every two minutes, and on Ctrl-C",
    "hub_private": "leave it out; a repository that --push-to-hub makes is private",
    "max_grad_norm": "leave it out, or take a lower --learning-rate",
}
OLD: Mapping[str, str] = {
    **dict.fromkeys(_NEW, "it is now part of --method; write the config anew"),
    "guided_rollout_ratio": "it is now part of rollout; 0 is rollout: teacher",
    "null_space": "it is now part of closed_form; 0 is closed_form: false",
    "hub_model_id": "it is now push_to_hub: OWNER/NAME",
    **{name: f"it is gone; {instead}" for name, instead in _GONE.items()},
}


def _check_there(name: str) -> None:
    if name in _GONE:
        raise UserError(f"{flag(name)} is gone; {_GONE[name]}")
