"""Model sources: a diffusers directory, a hub id, or a single-file checkpoint. All become a directory on disk.

Models that are not a diffusers directory of safetensors files are converted once (`conversion.py`).
"""

import contextlib
import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import errors, hf_hub_download, snapshot_download
from torch import Tensor

from esd_peft.errors import UserError, one_line
from esd_peft.io.paths import exists, is_dir, is_file
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.conversion import (
    INDEX,
    PAPERS,
    check_values,
    checkpoint_as_directory,
    denoiser_as_directory,
    read_checkpoint,
    stored_weights,
    without_pickles,
)
from esd_peft.models.gguf_file import GGUF, read_gguf
from esd_peft.models.hub_cache import is_snapshot
from esd_peft.models.pipeline_directory import PipelineDirectory
from esd_peft.models.transformer_file import is_whole
from esd_peft.options.model import ModelOptions
from esd_peft.worlds import WORLDS

Families = Mapping[str, type[PipelineDirectory]]  # by the names of their pipelines' classes
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of whichever client the hub library uses
CHECKPOINTS = (".safetensors", ".ckpt", ".bin", GGUF)
CONFIGS = ["*.json", "*.txt", "*.model"]  # of a pipeline, with its tokenizers
_NO_CODE = {"trust_remote_code": False}  # of a repository
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PART = re.compile(r"[A-Za-z_]\w{0,99}")  # the names of a pipeline's parts are those of Python arguments


def local_pipeline(
    model: str, options: ModelOptions, option: str, known: Families, weights: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The directory of the pipeline that `model` names, and its parsed `model_index.json`.

    Without `weights`, a hub id's configs and tokenizers are enough. Only pipelines of the classes `known` are downloaded or
    converted. Nothing is unpickled without `options.allow_pickle`, and no code of a repository is run. Raises `UserError`
    for what is not there or not safe.
    """
    path = Path(model)
    is_checkpoint = is_file(path) or path.suffix in CHECKPOINTS
    on_hub = not is_checkpoint and not exists(path) and _HUB_ID.fullmatch(model) is not None
    _refuse_idle_options(options, on_hub, is_checkpoint)
    if is_checkpoint:
        return _from_checkpoint(path, options, option, known)
    folder = _index_on_hub(model, options, option).parent if on_hub else path
    index = read_index(folder, option, known)
    if on_hub:
        folder = _download(model, options, option, weights)
    check_links(folder, index, option)
    if weights and options.variant and not _has_variant(folder, index, options.variant):
        raise UserError(f"--variant {options.variant}: {option} {model} has no weights of that name; leave it out")
    if options.allow_pickle:
        check_classes(index, "--allow-pickle")
        folder = without_pickles(folder, index, options.variant)
    return folder, index


def read_index(path: Path, option: str, known: Families) -> dict[str, Any]:
    """The `model_index.json` in `path`. Raises `UserError` if it is not there, damaged, or of no family `known`."""
    if not is_file(path / INDEX):
        why = f"it has no {INDEX}" if exists(path) else f"it is not there; embedded pipelines are {', '.join(WORLDS)}"
        raise UserError(f"{option} {path} is not a diffusers pipeline directory: {why}")
    try:
        index = read_json(path / INDEX)
        name = index["_class_name"]
        parts = {part: value for part, value in index.items() if isinstance(value, list)}
        pairs = all(len(part) == 2 and {*map(type, part)} in ({str}, {type(None)}) for part in parts.values())
        if not (pairs and isinstance(name, str)):
            raise UnreadableError("a part is [library, class] or [null, null], and the pipeline's class a name")
        if odd := [part for part in parts if not _PART.fullmatch(part)]:
            raise UserError(f"{option} {path}: {INDEX} calls a part {odd[0][:40]!a}, which is no folder's name; restore it")
    except UnreadableError as error:
        raise UserError(f"{option} {path}: {INDEX} is damaged ({error}); restore it") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{option} {path}: {INDEX} is damaged; restore it") from None
    if name not in known:
        raise UserError(f"{option} {path} is a {name}; the families known here are {', '.join(known)}")
    known[name].check_index(index, f"{option} {path}")
    return index


def check_classes(index: dict[str, Any], option: str) -> None:
    """Raise `UserError` for a part of another library: loading a whole pipeline would import it, and so run its code."""
    for part, value in index.items():
        library = value[0] if isinstance(value, list) else None
        if not (library in (None, "diffusers", "transformers") or hasattr(diffusers.pipelines, library)):
            raise UserError(f"{option}: its {part} is no class of diffusers or transformers; restore {INDEX}")


def inside_model(path: Path, file: Path) -> bool:
    """Return whether `file` lies in the directory `path`, through links; a snapshot may link to its repository's blobs."""
    root = path.resolve()
    return not is_circle(file) and file.resolve().is_relative_to(root.parents[1] if is_snapshot(root) else root)


def is_circle(file: Path) -> bool:
    """Return whether `file` is part of a circle of links."""
    try:
        file.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def check_links(path: Path, index: dict[str, Any], option: str) -> None:
    """Raise `UserError` for a part or a file that lies outside the directory: it would be copied into what is published.

    A snapshot in the hub's cache links to the `blobs` of its own repository.
    """
    for part in [name for name, value in index.items() if isinstance(value, list)]:
        for file in [path / part, *(path / part).rglob("*")]:
            if is_circle(file):
                raise UserError(
                    f"{option} {path}: {file.relative_to(path)} is a link in a circle of links; put the file there"
                )
            if not inside_model(path, file):
                raise UserError(f"{option} {path}: {file.relative_to(path)} links out of the directory; put the file there")


def _refuse_idle_options(options: ModelOptions, on_hub: bool, is_checkpoint: bool) -> None:
    if options.revision and not on_hub:
        raise UserError("--revision works with a hub id only; leave it out")
    if options.variant and is_checkpoint:
        raise UserError("--variant names files of a directory or a hub repository; leave it out with a single file")
    if options.checkpoint_config and not is_checkpoint:
        raise UserError("--checkpoint-config works with a single-file checkpoint only; leave it out")


def _index_on_hub(model: str, options: ModelOptions, option: str) -> Path:
    return Path(_from_hub(lambda: hf_hub_download(model, INDEX, revision=options.revision), model, options, option))


def _download(model: str, options: ModelOptions, option: str, weights: bool = True, without: str | None = None) -> Path:
    """Download the files that the pipeline's class reads, and no others: safetensors of one variant, configs, tokenizers.

    The part `without` comes as its config alone.
    """

    def download() -> Path:
        if not weights:
            return Path(snapshot_download(model, revision=options.revision, allow_patterns=CONFIGS))
        safe = None if options.allow_pickle else True  # None: pickles if there are no safetensors
        pipeline = diffusers.DiffusionPipeline
        version = {"revision": options.revision, "variant": options.variant}
        folder = pipeline.download(
            model, **version, use_safetensors=safe, **_NO_CODE, **({without: None} if without else {})
        )
        if without:
            snapshot_download(model, revision=options.revision, allow_patterns=[f"{without}/config.json"])
        return Path(folder)

    folder = _from_hub(download, model, options, option)
    with contextlib.suppress(OSError, HTTPError):  # not needed, and not in every cache
        snapshot_download(model, revision=options.revision, allow_patterns=PAPERS)
    return folder


def _from_hub(get: Callable[[], Any], model: str, options: ModelOptions, option: str) -> Any:
    """Return what `get` downloads, or finds in the hub's cache; each error becomes one sentence."""
    at = f" at --revision {options.revision}" if options.revision else ""
    try:
        return get()
    except Exception as error:  # errors of the hub and the network, also wrapped by diffusers
        kinds = (type(error), type(error.__cause__))

        def is_a(*wanted: type[BaseException]) -> bool:
            return any(issubclass(kind, wanted) for kind in kinds)

        if is_a(errors.GatedRepoError):
            problem = "is gated; accept its terms on the hub, then log in with `hf auth login`"
        elif is_a(errors.RepositoryNotFoundError):
            problem = "is neither here nor on the hub; check the name, or log in with `hf auth login` if it is private"
        elif is_a(errors.RevisionNotFoundError):
            problem = "is not on the hub; check the revision's name"
        elif is_a(errors.RemoteEntryNotFoundError):
            problem = f"is not a diffusers pipeline: it has no {INDEX} on the hub; name one that has"
        elif is_a(FileNotFoundError, ConnectionError, HTTPError) and not is_a(errors.HfHubHTTPError):
            problem = "is not all in the hub's cache, and the hub cannot be reached; download it once, or name a directory"
        elif "safetensors" in str(error):
            problem = "lacks safetensors files; name another --variant or --revision, or add --allow-pickle"
        else:
            problem = f"cannot be downloaded ({one_line(error)})"
        raise UserError(f"{option} {model}{at} {problem}") from None


def _from_checkpoint(path: Path, options: ModelOptions, option: str, known: Families) -> tuple[Path, dict[str, Any]]:
    """A single-file checkpoint as a directory, through diffusers' own converter."""
    if not is_file(path):
        raise UserError(f"{option} {path} is not there; name a file, a directory or a hub id")
    if path.suffix not in (".safetensors", GGUF) and not options.allow_pickle:
        raise UserError(f"{option} {path} is a pickle, which can run code; use a .safetensors file, or add --allow-pickle")
    if path.suffix == GGUF:  # which is dequantised, once
        return _from_denoiser(path, lambda: read_gguf(path, option), options, option, known)
    tensors = read_checkpoint(path, option)
    if not tensors:
        raise UserError(f"{option} {path} is not a whole checkpoint: it holds no weights; name another file")
    if not is_whole(tensors):
        return _from_denoiser(path, lambda: tensors, options, option, known)
    check_values(path, tensors, option)
    if not any(name.startswith("model.diffusion_model.") for name in tensors):
        raise UserError(f"{option} {path} is not a whole checkpoint: it has no model.diffusion_model layers")
    config = options.checkpoint_config or fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    folder = Path(config)
    if not is_dir(folder):
        at_default = ModelOptions()
        config_option = (
            "--checkpoint-config" if options.checkpoint_config else f"{option} {path} needs --checkpoint-config DIR:"
        )
        folder = Path(
            _from_hub(lambda: snapshot_download(config, allow_patterns=CONFIGS), config, at_default, config_option)
        )
    index = read_index(folder, "--checkpoint-config", known)
    family = getattr(diffusers, index["_class_name"])
    if not hasattr(family, "from_single_file"):
        raise UserError(f"{option} {path}: {family.__name__} has no single-file checkpoints; name a directory")

    check_classes(index, option)
    converted = checkpoint_as_directory(path, tensors, folder, family, option)
    return converted, read_index(converted, option, known)


def _from_denoiser(
    path: Path, read: Callable[[], dict[str, Tensor]], options: ModelOptions, option: str, known: Families
) -> tuple[Path, dict[str, Any]]:
    """A file of a denoiser alone as a directory, with the other parts of the pipeline that `--checkpoint-config` names."""
    config, config_option = options.checkpoint_config, "--checkpoint-config"
    if not config:
        raise UserError(
            f"{option} {path} is not a whole checkpoint: it has neither text encoders nor a VAE; name a diffusers directory "
            "or hub id that has them with --checkpoint-config"
        )
    folder = Path(config)
    if not is_dir(folder):
        at_default = ModelOptions(allow_pickle=options.allow_pickle)
        denoiser = known[
            read_index(_index_on_hub(config, at_default, config_option).parent, config_option, known)["_class_name"]
        ]
        folder = _download(config, at_default, config_option, without=denoiser.denoiser_part)
    index = read_index(folder, config_option, known)
    check_classes(index, config_option)
    check_links(folder, index, config_option)
    if options.allow_pickle:
        folder = without_pickles(folder, index, None)
    source = known[index["_class_name"]](folder, index, config_option)
    converted = denoiser_as_directory(path, read, source, option, config_option)
    return converted, read_index(converted, option, known)


def _has_variant(folder: Path, index: dict[str, Any], variant: str) -> bool:
    """Return whether a part has weights of that variant."""
    stored = (stored_weights(folder, index, part, variant) for part in index if isinstance(index[part], list))
    return any(weights is not None and weights.variant == variant for weights in stored)
