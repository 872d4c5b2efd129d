"""Where a model comes from: a diffusers directory, a hub id, a single-file checkpoint. It ends as a directory on disk.

What is not a diffusers directory of safetensors files (single-file checkpoints, pickles) is converted to one, once, in
the `esd_peft` folder of the hub's home (`HF_HOME`); that folder may be deleted at any time.
"""

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from os.path import exists, isfile  # false for a name that is too long, where Path raises
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import constants, errors, hf_hub_download, snapshot_download

from esd_peft.errors import UserError, in_brief
from esd_peft.io.jobs import hold
from esd_peft.io.outputs import new_directory
from esd_peft.io.tensors import sha256
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models.options import ModelOptions
from esd_peft.models.text_parts import write_for_every_version
from esd_peft.worlds import WORLDS

if TYPE_CHECKING:
    from esd_peft.models.family import ModelFamily

Families = Mapping[str, "type[ModelFamily]"]  # by the names of their pipelines' classes
HTTPError: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of whichever client the hub library uses
INDEX = "model_index.json"
CHECKPOINTS = (".safetensors", ".ckpt", ".bin")
CONFIGS = ["*.json", "*.txt", "*.model"]  # of a pipeline, with its tokenizers
PAPERS = ["README.md", "LICENSE*"]  # what a merged model passes on
_CONVERSION = 2  # of what is made here of a checkpoint, beside the libraries' versions: to be raised with it
_NO_CODE = {"trust_remote_code": False}  # of a repository
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def local_pipeline(
    model: str, options: ModelOptions, option: str, known: Families, weights: bool = True
) -> tuple[Path, dict[str, Any]]:
    """The directory of the pipeline that `model` names, and its parsed `model_index.json`.

    Without `weights`, a hub id's configs and tokenizers are enough. Only pipelines of the classes `known` are downloaded or
    converted. Nothing is unpickled without `options.allow_pickle`, and no code of a repository is run. Raises `UserError`
    for what is not there or not safe.
    """
    path = Path(model)
    is_file = isfile(path) or path.suffix in CHECKPOINTS
    on_hub = not is_file and not exists(path) and _HUB_ID.fullmatch(model) is not None
    _refuse_idle_options(options, on_hub, is_file)
    if is_file:
        return _from_checkpoint(path, options, option, known)
    folder = _index_on_hub(model, options, option).parent if on_hub else path
    index = read_index(folder, option, known)
    if on_hub:
        folder = _download(model, options, option, weights)
    check_links(folder, index, option)
    if weights and options.variant and not [*folder.glob(f"*/*.{options.variant}[.-]*")]:
        raise UserError(f"--variant {options.variant}: {option} {model} has no weights of that name; leave it out")
    if options.allow_pickle:
        folder = _without_pickles(folder, index, options)
    return folder, index


def commit_of(model: str | None, path: Path) -> str | None:
    """The commit of which the hub id `model` gave the snapshot `path`; none for what is named by its place here."""
    return path.name if is_snapshot(path) and model is not None and not Path(model).exists() else None


def is_snapshot(path: Path) -> bool:
    """Whether `path` is models--OWNER--NAME/snapshots/COMMIT, as the hub's cache is laid out."""
    return path.parent.name == "snapshots" and path.parents[1].name.startswith("models--")


def hub_id(path: Path) -> str | None:
    """OWNER/NAME of a snapshot."""
    return path.parents[1].name.removeprefix("models--").replace("--", "/") if is_snapshot(path) else None


def read_index(path: Path, option: str, known: Families) -> dict[str, Any]:
    """The `model_index.json` in `path`. Raises `UserError` if it is not there, damaged, or of no family `known`."""
    if not isfile(path / INDEX):
        why = f"it has no {INDEX}" if exists(path) else f"it is not there; embedded pipelines are {', '.join(WORLDS)}"
        raise UserError(f"{option} {path} is not a diffusers pipeline directory: {why}")
    try:
        index = read_json(path / INDEX)
        name = index["_class_name"]
        parts = [value for value in index.values() if isinstance(value, list)]
        pairs = all(len(part) == 2 and {*map(type, part)} in ({str}, {type(None)}) for part in parts)
        if not (pairs and isinstance(name, str)):
            raise UnreadableError("a part is [library, class] or [null, null], and the pipeline's class a name")
    except (UnreadableError, KeyError, TypeError, AttributeError):
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
    """Whether `file` lies in the directory `path`, wherever links lead; a snapshot's link to the blobs of its repository."""
    root = path.resolve()
    return file.resolve().is_relative_to(root.parents[1] if is_snapshot(root) else root)


def check_links(path: Path, index: dict[str, Any], option: str) -> None:
    """Raise `UserError` for a part or a file that lies outside the directory: it would be copied into what is published.

    A snapshot in the hub's cache links to the `blobs` of its own repository.
    """
    parts = [name for name, value in index.items() if isinstance(value, list)]
    if strange := [part for part in parts if Path(part).name != part]:
        raise UserError(f"{option} {path}: {INDEX} names the part {strange[0]}, outside the directory; restore it")
    for part in parts:
        for file in [path / part, *(path / part).rglob("*")]:
            if not inside_model(path, file):
                raise UserError(f"{option} {path}: {file.relative_to(path)} links out of the directory; put the file there")


def _refuse_idle_options(options: ModelOptions, on_hub: bool, is_file: bool) -> None:
    if options.revision and not on_hub:
        raise UserError("--revision works with a hub id only; leave it out")
    if options.variant and is_file:
        raise UserError("--variant names files of a directory or a hub repository; leave it out with a single file")
    if options.checkpoint_config and not is_file:
        raise UserError("--checkpoint-config works with a single-file checkpoint only; leave it out")


def _index_on_hub(model: str, options: ModelOptions, option: str) -> Path:
    return Path(_from_hub(lambda: hf_hub_download(model, INDEX, revision=options.revision), model, options, option))


def _download(model: str, options: ModelOptions, option: str, weights: bool) -> Path:
    """The files that the pipeline's class reads, and no others: safetensors of one variant, configs, tokenizers."""

    def download() -> Path:
        if not weights:
            return Path(snapshot_download(model, revision=options.revision, allow_patterns=CONFIGS))
        safe = None if options.allow_pickle else True  # none: pickles where there is nothing else
        pipeline = diffusers.DiffusionPipeline
        folder = pipeline.download(
            model, revision=options.revision, variant=options.variant, use_safetensors=safe, **_NO_CODE
        )
        return Path(folder)

    folder = _from_hub(download, model, options, option)
    with contextlib.suppress(OSError, HTTPError):  # not needed, and not in every cache
        snapshot_download(model, revision=options.revision, allow_patterns=PAPERS)
    return folder


def _from_hub(get: Callable[[], Any], model: str, options: ModelOptions, option: str) -> Any:
    """What `get` downloads, or finds in the hub's cache; its errors as one sentence each."""
    at = f" at --revision {options.revision}" if options.revision else ""
    try:
        return get()
    except Exception as error:  # the hub's own, the network's, and what diffusers wraps them in
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
            problem = f"cannot be downloaded ({in_brief(error)})"
        raise UserError(f"{option} {model}{at} {problem}") from None


def _from_checkpoint(path: Path, options: ModelOptions, option: str, known: Families) -> tuple[Path, dict[str, Any]]:
    """A single-file checkpoint as a directory, through diffusers' own converter."""
    if not isfile(path):
        raise UserError(f"{option} {path} is not there; name a file, a directory or a hub id")
    if path.suffix != ".safetensors" and not options.allow_pickle:
        raise UserError(f"{option} {path} is a pickle, which can run code; use a .safetensors file, or add --allow-pickle")
    try:
        tensors = load_single_file_checkpoint(str(path))
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise UserError(f"{option} {path} cannot be read ({in_brief(error)}); restore it") from None
    if not any(name.startswith("model.diffusion_model.") for name in tensors):
        raise UserError(f"{option} {path} is not a whole checkpoint: it has no model.diffusion_model layers")
    config = options.checkpoint_config or fetch_diffusers_config(tensors)["pretrained_model_name_or_path"]
    folder = Path(config)
    if not folder.is_dir():
        at_default = ModelOptions()
        said = "--checkpoint-config" if options.checkpoint_config else f"{option} {path} needs --checkpoint-config DIR:"
        folder = Path(_from_hub(lambda: snapshot_download(config, allow_patterns=CONFIGS), config, at_default, said))
    index = read_index(folder, "--checkpoint-config", known)
    family = getattr(diffusers, index["_class_name"])
    if not hasattr(family, "from_single_file"):
        raise UserError(f"{option} {path}: {family.__name__} has no single-file checkpoints; name a directory")

    check_classes(index, option)
    dtype = _dtype(tensors, path, option)

    def make() -> diffusers.DiffusionPipeline:
        # beside the denoiser's weights a checkpoint holds what is always there, never a safety checker
        none = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in index}
        pipeline = family.from_single_file(str(path), config=str(folder), dtype=dtype, **none)
        return marked(pipeline, tensors)

    configs = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".txt", ".model") and isfile(file))
    converted = _converted([path, *configs], path.stem, make, option)
    return converted, read_index(converted, option, known)


def marked(pipeline: diffusers.DiffusionPipeline, tensors: dict[str, torch.Tensor]) -> diffusers.DiffusionPipeline:
    """The pipeline with the scheduler that marker tensors in its checkpoint ask for, by ComfyUI's rules for SDXL.

    What the file says of itself goes before what its configs say. `edm_mean` and `edm_std` are Playground v2.5's (EDM, ε);
    `edm_vpred.sigma_max` CosXL's (EDM, v); `v_pred` that the denoiser predicts v, with `ztsnr` from zero terminal SNR on.
    """
    config, change, kind = {**pipeline.scheduler.config}, dict[str, Any](), type(pipeline.scheduler)
    if "edm_mean" in tensors and "edm_std" in tensors:
        kind = diffusers.EDMDPMSolverMultistepScheduler
        change |= {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
        means = {"latents_mean": tensors["edm_mean"], "latents_std": tensors["edm_std"]}
        pipeline.vae.register_to_config(**{name: value.flatten().tolist() for name, value in means.items()})
    elif "edm_vpred.sigma_max" in tensors:
        sigmas = {"sigma_min": 0.002, "sigma_max": 120.0}
        found = {name: float(tensors[key]) for name in sigmas if (key := f"edm_vpred.{name}") in tensors}
        kind = diffusers.EDMEulerScheduler
        change |= sigmas | found | {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}
    elif "v_pred" in tensors:
        change["prediction_type"] = "v_prediction"
        if "ztsnr" in tensors:
            change |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
            if "rescale_betas_zero_snr" not in inspect.signature(kind.__init__).parameters:
                kind = diffusers.EulerDiscreteScheduler
    else:
        return pipeline
    pipeline.register_modules(scheduler=kind.from_config(config | change))
    return pipeline


def _dtype(tensors: dict[str, torch.Tensor], path: Path, option: str) -> torch.dtype:
    """The one dtype that holds all of the checkpoint's weights without loss; markers and other single numbers are none."""
    floats = {value.dtype for value in tensors.values() if value.dtype.is_floating_point and value.numel() > 1}
    if any(dtype.itemsize < 2 for dtype in floats):
        raise UserError(f"{option} {path} holds weights in 8 bits, too coarse to erase from; use a 16- or 32-bit file")
    return floats.pop() if len(floats) == 1 else torch.float32


def _refuse_invented(pipeline: diffusers.DiffusionPipeline, place: str) -> None:
    """Raise `UserError` for weights that the source has not: the converter leaves them without values."""
    for part, module in pipeline.components.items():
        for name, value in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            if value.is_meta:
                raise UserError(
                    f"{place} lacks weights of its {part}, or calls them otherwise: {name} first; name another file"
                )


def _without_pickles(folder: Path, index: dict[str, Any], options: ModelOptions) -> Path:
    """`folder` itself, or where parts of it are pickles only, the same pipeline as safetensors files."""
    check_classes(index, "--allow-pickle")
    parts = [folder / name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    pickles = [file for part in parts if not [*part.glob("*.safetensors")] for file in part.glob("*.bin")]
    if not pickles:
        return folder

    def make() -> diffusers.DiffusionPipeline:
        family = getattr(diffusers, index["_class_name"])
        return family.from_pretrained(folder, variant=options.variant, local_files_only=True, **_NO_CODE)

    files = [file for file in sorted(folder.rglob("*")) if isfile(file)]
    return _converted(files, folder.name, make, "--allow-pickle", str(options.variant))


def _converted(sources: list[Path], name: str, make: Callable[[], Any], option: str, detail: str = "") -> Path:
    """What `make` returns, saved in a folder that changes with what is in the source files, wherever these lie."""
    contents = [(file.name, file.parent.name, sha256(file)) for file in sources]
    versions = (diffusers.__version__, transformers.__version__, _CONVERSION)
    key = hashlib.sha256(json.dumps([contents, detail, versions]).encode()).hexdigest()[:16]
    target = Path(constants.HF_HOME) / "esd_peft" / key / name
    if not (target / INDEX).is_file():
        with hold(target, "HF_HOME", wait=True):  # all processes of a run want it at once
            if not (target / INDEX).is_file():
                _convert(make, sources[0], target, option)
    return target


def _convert(make: Callable[[], Any], source: Path, target: Path, option: str) -> None:
    with new_directory(
        target, "a converted pipeline", overwrite=True, option="HF_HOME", private_as=[source.parent]
    ) as draft:
        try:
            pipeline = make()
            _refuse_invented(pipeline, f"{option} {source}")
        except UserError:
            raise
        except Exception as error:  # the libraries raise many kinds for names and shapes that do not fit
            raise UserError(f"{option} {source} does not fit its configs ({in_brief(error)})") from None
        pipeline.save_pretrained(draft)
        write_for_every_version(draft)
