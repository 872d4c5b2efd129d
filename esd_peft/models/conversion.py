"""Conversion of single-file checkpoints and pickles to a diffusers directory of safetensors files.

The directory lies in the `esd_peft` folder of the hub's home (`HF_HOME`), which may be deleted at any time.
"""

import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.model_loading_utils import load_state_dict
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from esd_peft.errors import UserError, one_line
from esd_peft.io.jobs import lock_output
from esd_peft.io.outputs import new_directory
from esd_peft.io.paths import is_dir, is_file
from esd_peft.io.tensors import DTYPES, NewTensor, as_bytes, is_scale, is_unscaled, sha256, write_tensors
from esd_peft.models.pipeline_directory import PipelineDirectory
from esd_peft.models.text_parts import write_for_every_version
from esd_peft.models.transformer_file import dequantized, under_diffusers_names
from esd_peft.models.weight_files import PICKLED, SAFE, StoredWeights, find_weights, library_of, weight_map

INDEX = "model_index.json"
PAPERS = ["README.md", "LICENSE*"]  # files that a merged model keeps
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|ckpt|pt|pth|msgpack|h5|onnx|onnx_data|gguf)$|(\.safetensors|\.bin)\.index.*\.json$"
)
_CONVERSION = 3  # version of this conversion; the hash also has the libraries' versions


def checkpoint_as_directory(
    path: Path, tensors: dict[str, torch.Tensor], configs: Path, pipeline_class: Any, option: str
) -> Path:
    """Convert a single-file checkpoint to a directory with diffusers' own converter.

    `tensors` are the checkpoint's (`read_checkpoint`), `configs` a directory with the configs and tokenizers that fit it.
    Raises `UserError` for weights that are missing or do not fit.
    """

    def write(draft: Path) -> None:
        # a checkpoint has denoiser, VAE and text encoders, never a safety checker
        takes = inspect.signature(pipeline_class.__init__).parameters
        none = {name: None for name in ("safety_checker", "feature_extractor", "image_encoder") if name in takes}
        pipeline = pipeline_class.from_single_file(str(path), config=str(configs), dtype=_dtype(tensors), **none)
        _refuse_invented(pipeline, f"{option} {path}")
        marked(pipeline, tensors).save_pretrained(draft)

    files = sorted(file for file in configs.rglob("*") if file.suffix in (".json", ".txt", ".model") and is_file(file))
    return _converted([path, *files], path.stem, write, option)


def denoiser_as_directory(
    path: Path, read: Callable[[], dict[str, Tensor]], source: PipelineDirectory, option: str, config_option: str
) -> Path:
    """Convert a file of a denoiser's weights alone to a directory with the other parts of the pipeline `source`.

    `read` returns the file's tensors; it is called only if they have not been converted before. Raises `UserError` for
    weights that are missing or do not fit.
    """
    place, denoiser = f"{option} {path}", source.denoiser_part
    parts = [name for name, value in source.index.items() if isinstance(value, list) and value[0] is not None]
    parts = [name for name in parts if is_dir(source.path / name)]
    source.part(denoiser).check_config()
    weights = {part: stored_weights(source.path, source.index, part, None, (SAFE,)) for part in parts if part != denoiser}
    for part in source.used:
        if source.has(part) and part != denoiser and source.part(part).has_weights and not weights[part]:
            raise UserError(
                f"{config_option} {source.path} lacks the weights of its {part}, which {place} has not either; name a "
                f"directory or hub id with all parts but the {denoiser}"
            )

    def write(draft: Path) -> None:
        found = under_diffusers_names(dequantized(read(), place), source.part(denoiser), place)
        dtype = _dtype(found)
        for file in files:
            copy = draft / file.relative_to(source.path)
            copy.parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(file, copy)
        (kind,) = (kind for kind, stored_as in DTYPES.items() if stored_as == dtype)
        new = [
            NewTensor(name, kind, [*value.shape], value.numel() * dtype.itemsize, partial(_bytes_of, value, dtype))
            for name, value in found.items()
        ]
        write_tensors(draft / denoiser / f"diffusion_pytorch_model{SAFE}", new, {})

    stored = {file for found in weights.values() if found for file in [*found.files, found.index] if file}
    names = [INDEX, *PAPERS, f"{denoiser}/config.json", *(f"{part}/**/*" for part in parts if part != denoiser)]
    files = [file for name in names for file in sorted(source.path.glob(name)) if is_file(file)]
    files = [file for file in files if file in stored or not _WEIGHTS.search(file.name)]
    return _converted([path, *files], path.stem, write, option, denoiser)


def _bytes_of(value: Tensor, dtype: torch.dtype) -> bytes:
    return as_bytes(value.to(dtype).contiguous())


def read_checkpoint(path: Path, option: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a single file by name, as they are stored. Raises `UserError` if it cannot be read."""
    try:
        content: Any = load_state_dict(str(path))
        for _ in range(2):  # some files nest their weights under this name; a file that nests itself is invalid
            content = content.get("state_dict", content)
        if not all(isinstance(name, str) for name in content):
            raise ValueError("it holds no weights by name")
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise UserError(f"{option} {path} cannot be read ({one_line(error)}); restore it") from None
    return tensors


def check_values(path: Path, tensors: dict[str, torch.Tensor], option: str) -> None:
    """Raise `UserError` for weights in 8 bits."""
    for name, value in tensors.items():
        if is_scale(name) or (value.numel() > 1 and not is_unscaled(value.dtype, name)):
            raise UserError(
                f"{option} {path} holds weights in 8 bits or whole numbers ({name}), too coarse to erase from; use a 16- or "
                "32-bit file"
            )


def _dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the common dtype of the checkpoint's weights, else float32; single numbers such as markers do not count."""
    floats = {value.dtype for value in tensors.values() if value.dtype.is_floating_point and value.numel() > 1}
    return floats.pop() if len(floats) == 1 else torch.float32


def marked(pipeline: diffusers.DiffusionPipeline, tensors: dict[str, torch.Tensor]) -> diffusers.DiffusionPipeline:
    """Give the pipeline the scheduler that marker tensors in its checkpoint ask for, by ComfyUI's rules for SDXL.

    Markers in the file override its configs. `edm_mean` and `edm_std` are Playground v2.5's (EDM, ε);
    `edm_vpred.sigma_max` CosXL's (EDM, v); `v_pred` means v-prediction, with `ztsnr` at zero terminal SNR.
    """
    config, change, kind = {**pipeline.scheduler.config}, dict[str, Any](), type(pipeline.scheduler)
    if "edm_mean" in tensors and "edm_std" in tensors:
        kind = diffusers.EDMDPMSolverMultistepScheduler
        change |= {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}
        means = {"latents_mean": tensors["edm_mean"], "latents_std": tensors["edm_std"]}
        pipeline.vae.register_to_config(**{name: value.flatten().tolist() for name, value in means.items()})
    elif "edm_vpred.sigma_max" in tensors:
        sigmas = {"sigma_min": 0.002, "sigma_max": 120.0}
        stored_sigmas = {name: float(tensors[key]) for name in sigmas if (key := f"edm_vpred.{name}") in tensors}
        kind = diffusers.EDMEulerScheduler
        change |= (
            sigmas | stored_sigmas | {"sigma_data": 1.0, "prediction_type": "v_prediction", "sigma_schedule": "exponential"}
        )
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


def _refuse_invented(pipeline: diffusers.DiffusionPipeline, place: str) -> None:
    """Raise `UserError` for weights that the source has not: the converter leaves them without values."""
    for part, module in pipeline.components.items():
        for name, value in module.state_dict().items() if isinstance(module, torch.nn.Module) else ():
            if value.is_meta:
                raise UserError(
                    f"{place} lacks weights of its {part}, or calls them otherwise: {name} first; name another file"
                )


def stored_weights(
    folder: Path, index: dict[str, Any], part: str, variant: str | None, kinds: tuple[str, ...] = (SAFE, PICKLED)
) -> StoredWeights | None:
    """A part's weights, of the first of the `kinds` that is there."""
    found = (find_weights(folder / part, library_of(index[part]), variant, kind) for kind in kinds)
    return next((weights for weights in found if weights), None)


def without_pickles(folder: Path, index: dict[str, Any], variant: str | None) -> Path:
    """`folder` itself, or where parts of it are pickles only, the same pipeline as safetensors files."""
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    stored = {part: stored_weights(folder, index, part, variant) for part in parts}
    pickled = {part: weights for part, weights in stored.items() if weights and weights.files[0].suffix == PICKLED}
    if not pickled:
        return folder

    def write(draft: Path) -> None:
        passed_on = shutil.ignore_patterns(f"*{PICKLED}", f"*{PICKLED}.index*.json")
        for part in [part for part in parts if is_dir(folder / part)]:
            shutil.copytree(folder / part, draft / part, ignore=passed_on if part in pickled else None)
        for file in [folder / INDEX, *(file for name in PAPERS for file in folder.glob(name) if is_file(file))]:
            shutil.copy(file, draft)
        for part, weights in pickled.items():
            _write_safetensors(weights, draft / part)

    files = [file for part in parts for file in sorted((folder / part).rglob("*")) if is_file(file)]
    return _converted([folder / INDEX, *files], folder.name, write, "--allow-pickle", str(variant))


def _write_safetensors(weights: StoredWeights, folder: Path) -> None:
    """The tensors of pickles, file by file, as they are stored; what else the pickles hold is refused."""
    for file in weights.files:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        # tensors that share memory, as tied embeddings do, cannot be saved as they are
        save_file(
            {name: value.clone() for name, value in tensors.items()}, folder / weights.safe_name(file.name), {"format": "pt"}
        )
    if weights.index:
        names = {name: weights.safe_name(file) for name, file in weight_map(weights.index).items()}
        text = json.dumps({"metadata": {}, "weight_map": names}, indent=2) + "\n"
        (folder / weights.safe_name(weights.index.name)).write_text(text, encoding="utf-8")


def _converted(sources: list[Path], name: str, write: Callable[[Path], None], option: str, detail: str = "") -> Path:
    """Return the directory that `write` fills; its name depends on the content of the source files only."""
    contents = [(file.name, file.parent.name, sha256(file)) for file in sources]
    versions = (diffusers.__version__, transformers.__version__, _CONVERSION)
    key = hashlib.sha256(json.dumps([contents, detail, versions]).encode()).hexdigest()[:16]
    target = Path(constants.HF_HOME) / "esd_peft" / key / name
    if not is_file(target / INDEX):
        with lock_output(target, "HF_HOME", wait=True):  # all processes of a run want it at once
            if not is_file(target / INDEX):
                _convert(write, sources[0], target, option)
    return target


def _convert(write: Callable[[Path], None], source: Path, target: Path, option: str) -> None:
    with new_directory(
        target, "a converted pipeline", overwrite=True, option="HF_HOME", private_as=[source.parent]
    ) as draft:
        try:
            write(draft)
        except UserError:
            raise
        except Exception as error:  # the libraries raise many kinds for names and shapes that do not fit
            raise UserError(f"{option} {source} does not fit its configs ({one_line(error)})") from None
        write_for_every_version(draft)
