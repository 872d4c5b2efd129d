"""`adapter_config.json` of PEFT: what it may ask for here, and what it says of some layers only.

It may come from anybody. So what it holds is bounded before PEFT acts on it: patterns are matched here, within a time, and
PEFT is told the names of layers instead.
"""

import copy
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import regex

from esd_peft.errors import UserError, in_brief
from esd_peft.io.text import UnreadableError, read_json

SECONDS = 5.0  # for all patterns of an adapter together; usual ones take some milliseconds
_LARGEST = 4 * 2**20  # bytes
_LONGEST = 500  # characters of a pattern
_MOST = 2**16  # of a rank, or whatever else a number may be of
# what PEFT makes or does so many times for a layer, one by one in Python; the rank of HRA is a loop, too
_MOST_TIMES = 128
_TIMES = (
    "depth", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter", "num_subspaces", "num_B", "boft_n_butterfly_factor",
    "gralora_k",
)  # fmt: skip
# what changes more than the weights of layers that are there, or what no file of the adapter holds
_REFUSED = (
    "megatron_config", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "monteclora_config", "velora_config", "use_qalora",
)  # fmt: skip
# what puts other models beside the base, or other layers into it
_OTHER_MODELS = ("XLORA", "SHADOW", "ADAPTION_PROMPT")
# These make another base first: some as a function of the base alone, which PEFT repeats when the adapter is read, the
# others with data, at random, or for a base in few bits
REPEATED = ("pissa", "olora")
_ONCE = ("pissa_niter", "corda", "loftq", "lora_ga")


class Patterns:
    """Which of an adapter's patterns a layer's name matches, as PEFT reads them; for all names together within `SECONDS`."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, SECONDS

    def first(self, patterns: Iterable[str], name: str) -> str | None:
        """The first that matches the name or its last parts. Raises `UserError` for one that is not a plain pattern."""
        return next((pattern for pattern in patterns if self.whole(pattern, name, r"(.*\.)?")), None)

    def whole(self, pattern: str, name: str, before: str = "") -> bool:
        """Whether it matches all of the name. Raises `UserError` for one that is not a plain pattern."""
        if not isinstance(pattern, str) or len(pattern) > _LONGEST or "{" in pattern or re.search(r"\(\?(?!:)", pattern):
            raise _wrong(self.path, f"asks for the pattern {str(pattern)[:50]!r}, which is not a plain one")
        start = time.monotonic()
        try:
            return regex.fullmatch(f"{before}({pattern})", name, timeout=self.left) is not None
        except (regex.error, TimeoutError, RecursionError) as error:
            raise _wrong(self.path, f"asks for the pattern {pattern[:50]!r}, which is not matched ({error})") from None
        finally:
            self.left = max(self.left - (time.monotonic() - start), 1e-3)


def read_peft_config(path: Path) -> peft.PeftConfig:
    """The config in the adapter directory `path`.

    Raises `UserError` for one that is damaged, or that asks for what a merge cannot do, by name.
    """
    file = path / peft.utils.CONFIG_NAME
    try:
        values = {**read_json(file, _LARGEST)}
    except (UnreadableError, TypeError) as error:
        raise _wrong(path, f"is damaged ({error}); restore it") from None
    kind = values.get("peft_type")
    for field in _REFUSED:
        if values.get(field):
            raise _wrong(path, f"asks for {field}, which cannot be merged into a denoiser's weights")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_ONCE):
        raise _wrong(
            path,
            f"says init_lora_weights {start[:50]!r}: it fits a base that only its training had; save it with "
            "path_initial_model_for_weight_conversion",
        )
    if large := next(_too_large(values, _MOST_TIMES if kind == "HRA" else _MOST), None):
        raise _wrong(path, f"asks for {large}, which is more than any layer has")
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if made is None:
        raise _wrong(path, f"is of a kind that this version of peft does not know ({str(kind)[:50]})")
    if issubclass(made, peft.PromptLearningConfig) or kind in _OTHER_MODELS:
        raise _wrong(path, f"is of {kind}, which does not change weights, as LoRA does; name one that does")
    if unknown := sorted(key for key, value in values.items() if value and key not in made.__dataclass_fields__):
        raise _wrong(path, f"asks for {unknown[0][:50]}, which this version of peft does not know; install a newer one")
    try:
        return made(**values)
    except Exception as error:  # what PEFT raises for values it does not expect is of many kinds
        raise _wrong(path, f"is damaged ({in_brief(error)}); restore it") from None


def fits_base_only(config: peft.PeftConfig) -> bool:
    """Whether the adapter fits the base as it is stored and no other weights, because it begins by changing them."""
    begins = getattr(config, "init_lora_weights", None) in REPEATED or getattr(config, "kasa_config", None) is not None
    return begins or config.peft_type in ("OSF", "PSOFT")  # by name: older versions of peft have no member for PSOFT


def multiplies(config: peft.PeftConfig) -> bool:
    """Whether the adapter multiplies the weight that it meets: with another one the order would matter, or their product be
    more than both changes together."""
    return config.peft_type in ("BOFT", "HRA", "IA3", "OFT", "ROAD")


def targeted(config: peft.PeftConfig, names: Iterable[str], patterns: Patterns) -> list[str]:
    """Those of the layers `names` that the config is for, as PEFT reads it; none where its patterns are not plain."""
    said: Any = config
    try:
        chosen = [name for name in names if _names(said.target_modules, name, patterns)]
        chosen = [name for name in chosen if not _names(getattr(said, "exclude_modules", None), name, patterns)]
    except UserError:
        return []
    whole = [f".{part}." for part in getattr(said, "modules_to_save", None) or ()]
    chosen = [name for name in chosen if not any(part in f".{name}." for part in whole)]
    indexes, before = (getattr(said, field, None) for field in ("layers_to_transform", "layers_pattern"))
    if indexes in (None, []) or isinstance(said.target_modules, str):
        return chosen
    before = [before] if isinstance(before, str) else before or []
    lists = "|".join(map(re.escape, before)) or r"[^.]*"
    found = {name: re.match(rf"(?:^|.*?\.)(?:{lists})\.(\d+)\.", name) for name in chosen}
    wanted = {*([indexes] if isinstance(indexes, int) else indexes)}
    return [name for name, match in found.items() if match and int(match[1]) in wanted]


def for_layers(config: peft.PeftConfig, names: list[str], patterns: Patterns) -> peft.PeftConfig:
    """The same config for exactly the layers `names`, without patterns. Raises `UserError` for those that are not plain."""
    config = copy.deepcopy(config)
    config.inference_mode, config.base_model_name_or_path = True, None
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if hasattr(config, field):
            setattr(config, field, None)
    for field in [field for field in vars(config) if field.endswith("_pattern")]:
        if values := getattr(config, field):
            setattr(config, field, _exact(dict(values), names, patterns))
    feeds: Any = getattr(config, "feedforward_modules", None)
    if isinstance(feeds, str):  # of IA3: a pattern, or what names end with
        config.feedforward_modules = [name for name in names if patterns.whole(feeds, name)]
    elif feeds:
        config.feedforward_modules = [name for name in names if name.endswith(tuple(map(str, feeds)))]
    config.target_modules = names
    return config


def _names(given: Any, name: str, patterns: Patterns) -> bool:
    """Whether a list of names, or of their ends, or a pattern means the layer."""
    if isinstance(given, str):
        return patterns.whole(given, name)
    parts, known = name.split("."), {*given} if given else set()
    return any(".".join(parts[i:]) in known for i in range(len(parts)))


def _too_large(values: dict[str, Any], most: int) -> Iterator[str]:
    """Numbers by which PEFT would size or repeat something, beyond what makes sense; seeds may be any."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _too_large(value, most)
        elif "seed" in key or "prng" in key or not isinstance(value, int):
            continue
        elif abs(value) > (_MOST_TIMES if key in _TIMES else most):
            yield f"{key[:50]} {str(value)[:20]}"


def _exact(values: dict[str, Any], names: list[str], patterns: Patterns) -> dict[str, Any]:
    found = {name: patterns.first(values, name) for name in names}
    return {re.escape(name): values[key] for name, key in found.items() if key is not None}


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"--adapter {path}: its {peft.utils.CONFIG_NAME} {what}")
