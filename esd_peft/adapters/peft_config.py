"""PEFT's `adapter_config.json`: checks of its values, and the settings that apply to some layers only.

The file is untrusted, so its values are limited before PEFT uses them: patterns are matched here, with a time limit, and
PEFT gets the names of layers instead.
"""

import copy
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import regex

from esd_peft.errors import UserError, one_line
from esd_peft.io.text import UnreadableError, read_json

SECONDS = 5.0  # for all patterns of an adapter together; usual ones take some milliseconds
_LARGEST = 4 * 2**20  # bytes
_LONGEST = 500  # characters of a pattern
_MOST = 2**16  # largest rank or other number
# settings that PEFT loops over in Python for each layer; the rank of HRA is a loop, too
_MOST_TIMES = 128
_TIMES = (
    "depth", "num_cayley_neumann_terms", "psoft_svd_lowrank_niter", "num_subspaces", "num_B", "boft_n_butterfly_factor",
    "gralora_k",
)  # fmt: skip
# settings that change more than the weights of existing layers, or need files that the adapter lacks
_REFUSED = (
    "megatron_config", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "monteclora_config", "velora_config", "use_qalora",
)  # fmt: skip
# methods that add models next to the base, or layers to it
_OTHER_MODELS = ("XLORA", "SHADOW", "ADAPTION_PROMPT")
# Initialisations that change the base first: PEFT repeats REPEATED when it reads the adapter, since they depend on the base
# alone; those in _ONCE need data, are random, or need a quantized base
REPEATED = ("pissa", "olora")
_ONCE = ("pissa_niter", "corda", "loftq", "lora_ga")


class Patterns:
    """Matches layer names against an adapter's patterns as PEFT does, within `SECONDS` for all names together."""

    def __init__(self, path: Path) -> None:
        self.path, self.left = path, SECONDS

    def first(self, patterns: Iterable[str], name: str) -> str | None:
        """Return the first pattern that matches the name or its end. Raises `UserError` for a pattern that is not plain."""
        return next((pattern for pattern in patterns if self.whole(pattern, name, r"(.*\.)?")), None)

    def whole(self, pattern: str, name: str, before: str = "") -> bool:
        """Return whether the pattern matches all of the name. Raises `UserError` for a pattern that is not plain."""
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
    """Read the config in the adapter directory `path`.

    Raises `UserError` for a damaged file, and names settings that a merge cannot apply.
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
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if config_class is None:
        raise _wrong(path, f"is of a kind that this version of peft does not know ({str(kind)[:50]})")
    if issubclass(config_class, peft.PromptLearningConfig) or kind in _OTHER_MODELS:
        raise _wrong(path, f"is of {kind}, which does not change weights, as LoRA does; name one that does")
    if unknown := sorted(key for key, value in values.items() if value and key not in config_class.__dataclass_fields__):
        raise _wrong(path, f"asks for {unknown[0][:50]}, which this version of peft does not know; install a newer one")
    try:
        return config_class(**values)
    except Exception as error:  # PEFT raises many kinds of errors for unexpected values
        raise _wrong(path, f"is damaged ({one_line(error)}); restore it") from None


def fits_base_only(config: peft.PeftConfig) -> bool:
    """Return whether the adapter first changes the base, and so fits only the base as it is stored."""
    begins = getattr(config, "init_lora_weights", None) in REPEATED or getattr(config, "kasa_config", None) is not None
    return begins or config.peft_type in ("OSF", "PSOFT")  # by name: older versions of peft have no member for PSOFT


def multiplies(config: peft.PeftConfig) -> bool:
    """Return whether the adapter multiplies the weight.

    Such adapters cannot be combined: the result would depend on their order, or exceed the sum of both changes.
    """
    return config.peft_type in ("BOFT", "HRA", "IA3", "OFT", "ROAD")


def targeted(config: peft.PeftConfig, names: Iterable[str], patterns: Patterns) -> list[str]:
    """Return the layers of `names` that the config targets, by PEFT's rules; none if its patterns are not plain."""
    settings: Any = config
    try:
        selected = [name for name in names if _names(settings.target_modules, name, patterns)]
        selected = [name for name in selected if not _names(getattr(settings, "exclude_modules", None), name, patterns)]
    except UserError:
        return []
    whole = [f".{part}." for part in getattr(settings, "modules_to_save", None) or ()]
    selected = [name for name in selected if not any(part in f".{name}." for part in whole)]
    indexes, before = (getattr(settings, field, None) for field in ("layers_to_transform", "layers_pattern"))
    if indexes in (None, []) or isinstance(settings.target_modules, str):
        return selected
    before = [before] if isinstance(before, str) else before or []
    lists = "|".join(map(re.escape, before)) or r"[^.]*"
    matches = {name: re.match(rf"(?:^|.*?\.)(?:{lists})\.(\d+)\.", name) for name in selected}
    numbers = {*([indexes] if isinstance(indexes, int) else indexes)}
    return [name for name, match in matches.items() if match and int(match[1]) in numbers]


def for_layers(config: peft.PeftConfig, names: list[str], patterns: Patterns) -> peft.PeftConfig:
    """Return the config for exactly the layers `names`, without patterns. Raises `UserError` for patterns that are not
    plain.
    """
    config = copy.deepcopy(config)
    config.inference_mode, config.base_model_name_or_path = True, None
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if hasattr(config, field):
            setattr(config, field, None)
    for field in [field for field in vars(config) if field.endswith("_pattern")]:
        if values := getattr(config, field):
            setattr(config, field, _exact(dict(values), names, patterns))
    feeds: Any = getattr(config, "feedforward_modules", None)
    if isinstance(feeds, str):  # of IA3: a pattern, or ends of names
        config.feedforward_modules = [name for name in names if patterns.whole(feeds, name)]
    elif feeds:
        config.feedforward_modules = [name for name in names if name.endswith(tuple(map(str, feeds)))]
    config.target_modules = names
    return config


def _names(pattern: Any, name: str, patterns: Patterns) -> bool:
    """Return whether a pattern, or a list of names or of their ends, matches the layer."""
    if isinstance(pattern, str):
        return patterns.whole(pattern, name)
    parts, endings = name.split("."), {*pattern} if pattern else set()
    return any(".".join(parts[i:]) in endings for i in range(len(parts)))


def _too_large(values: dict[str, Any], most: int) -> Iterator[str]:
    """Yield the numbers that would make PEFT allocate or repeat something unreasonably often; seeds are not limited."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _too_large(value, most)
        elif "seed" in key or "prng" in key or not isinstance(value, int):
            continue
        elif abs(value) > (_MOST_TIMES if key in _TIMES else most):
            yield f"{key[:50]} {str(value)[:20]}"


def _exact(values: dict[str, Any], names: list[str], patterns: Patterns) -> dict[str, Any]:
    keys = {name: patterns.first(values, name) for name in names}
    return {re.escape(name): values[key] for name, key in keys.items() if key is not None}


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"--adapter {path}: its {peft.utils.CONFIG_NAME} {what}")
