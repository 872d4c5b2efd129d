"""Files for other tools: a kohya/ComfyUI LoRA next to the adapter, and a merged single-file checkpoint.

Both exist for Stable Diffusion 1.x, 2.x and XL, whose tools have their own weight names. For the transformer families
ComfyUI reads diffusers' names: `pytorch_lora_weights.safetensors`, or the merged transformer in one file. LoHa, LoKr and
`--adapter-type none` have no such file: merge them.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from esd_peft._version import __version__
from esd_peft.adapters.ldm_keys import clip_sources, unet_name, vae_name
from esd_peft.errors import UserError
from esd_peft.io.tensors import NewTensor, TensorFile, as_bytes, open_tensors, read_tensors, write_tensors
from esd_peft.models import ModelFamily
from esd_peft.models.checkpoint_layout import CheckpointLayout

KOHYA_FILE = "kohya_lora.safetensors"
_OUTER = {"conv_in", "conv_out", "time_embedding", "add_embedding", "class_embedding"}  # no module that kohya adapts
Merge = Callable[[str, Tensor], Tensor]  # a weight's name and the weight, as stored → as it is to be written


def own_metadata(concepts: list[str], scopes: list[str], base: dict[str, Any], configs: list[str]) -> dict[str, str]:
    """Return the safetensors metadata of an erasure; `configs` are the hashes of `config.yaml`."""
    return {
        "esd_peft.version": __version__,
        "esd_peft.concept": json.dumps(concepts, ensure_ascii=False),
        "esd_peft.scope": json.dumps(scopes),
        "esd_peft.base": base.get("name") or "",
        "esd_peft.base_sha256": json.dumps(base.get("denoiser_sha256")),
        "esd_peft.config_sha256": json.dumps(configs),
    }


def modelspec(family: ModelFamily, layout: CheckpointLayout, title: str, concepts: list[str], lora: bool) -> dict[str, str]:
    """Return the model metadata of Stability AI's standard, version 1.0.0, without a date: files stay reproducible."""
    diffusers_names = lora and not layout.original_lora_names
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": layout.architecture + ("/lora" if lora else ""),
        "modelspec.implementation": "diffusers" if diffusers_names else "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.description": f"Erases: {', '.join(concepts)}" if lora else f"Erased: {', '.join(concepts)}",
        "modelspec.prediction_type": "epsilon" if family.noise_schedule.predicts_noise else "v",
    }


def write_kohya_lora(
    adapter: Path, family: ModelFamily, title: str, concepts: list[str], scope: str, metadata: dict[str, str]
) -> None:
    """Write `kohya_lora.safetensors` next to the PEFT LoRA in `adapter`, for families with such a file."""
    layout = family.checkpoint_layout
    if layout is None:
        return
    settings = peft.PeftConfig.from_pretrained(adapter)
    unet = family.load_config(family.denoiser_part)
    tensors: dict[str, Tensor] = {}
    for key, value in read_tensors(adapter / peft.utils.SAFETENSORS_WEIGHTS_NAME).items():
        module, _, side = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if layout.original_lora_names:
            module = unet_name(f"{module}.weight", unet).removesuffix(".weight")
        name = "lora_unet_" + module.replace(".", "_")
        tensors[f"{name}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value
        tensors[f"{name}.alpha"] = torch.tensor(float(settings.lora_alpha))
    convolutions = {"conv_dim": str(settings.r), "conv_alpha": f"{settings.lora_alpha:g}"}
    described = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(settings.r),
        "ss_network_alpha": f"{settings.lora_alpha:g}",
        "ss_network_args": json.dumps(convolutions if any(t.dim() == 4 for t in tensors.values()) else {}),
        "ss_v2": str(layout.version.startswith("sd_v2")),
        "ss_base_model_version": layout.version,
        "ss_sd_model_name": metadata["esd_peft.base"],
        "ss_output_name": title,
        "ss_training_comment": f"erases {', '.join(concepts)} (scope {scope})",
        **modelspec(family, layout, title, concepts, lora=True),
    }
    write_tensors(adapter / KOHYA_FILE, [_new(name, value) for name, value in tensors.items()], described | metadata)


def limits(family: ModelFamily, layers: list[str]) -> list[str]:
    """Return a sentence for each limit of other tools with a LoRA on `layers`, as they behave today (docs/formats.md)."""
    sentences = []
    kohya = family.checkpoint_layout is not None
    if kohya and (outer := sorted({name.split(".")[0] for name in layers} & _OUTER)):
        sentences.append(f"{KOHYA_FILE}: kohya's tools and stable-diffusion.cpp skip {', '.join(outer)}; merge for these")
    if skipped := sorted({name.split(".")[0] for name in layers} & {*family.lora_skips}):
        sentences.append(f"pytorch_lora_weights.safetensors: ComfyUI skips {', '.join(skipped)}; merge for it")
    markers = family.lora_markers
    if markers and not any(mark in name for mark in markers for name in layers):
        file = KOHYA_FILE if kohya else "pytorch_lora_weights.safetensors"
        sentences.append(
            f"{file}: Invoke knows a LoRA's base by its {' or '.join(markers)}, and none is in it; merge for Invoke"
        )
    return sentences


def check_single_file(family: ModelFamily, output: Path) -> CheckpointLayout | None:
    """Return the layout of the kind's checkpoints; None for a kind whose file is the denoiser alone.

    Raises `UserError` if no tool could read the file, or encode the prompts for which it was made.
    """
    layout = family.checkpoint_layout
    if layout is None and not family.denoiser_is_a_file:
        raise UserError(
            f"--output {output}: a {family.pipeline_class.__name__} has no single-file checkpoint here; name a directory"
        )
    for part in [part for part in family.text_parts if "tokenizer" in part and family.has(part)] if layout else []:
        tokenizer = family.load_part(part).backend_tokenizer
        if added := sorted(tokenizer.get_vocab().keys() - tokenizer.get_vocab(with_added_tokens=False).keys()):
            raise UserError(
                f"--output {output}: the {part} has tokens of its own, {', '.join(added[:3])}, and a checkpoint file has no "
                "tokenizer; name a directory"
            )
    return layout


def write_checkpoint(path: Path, family: ModelFamily, merge: Merge, metadata: dict[str, str]) -> None:
    """Write the pipeline as one file, a tensor at a time; the denoiser's weights go through `merge`.

    Of a kind without checkpoints it is the transformer under diffusers' names.
    """
    layout = check_single_file(family, path)
    if layout is None:
        tensors = [*_renamed(family, family.denoiser_part, "", _one_each(lambda name, config: name), merge)]
        return write_tensors(path, tensors, metadata)
    tensors = [
        *_renamed(family, family.denoiser_part, "model.diffusion_model.", _one_each(unet_name), merge),
        *_renamed(family, "vae", "first_stage_model.", _one_each(vae_name)),
        *_markers(family),
    ]
    for part, prefix in layout.text_encoders.items():
        tensors += _renamed(family, part, prefix, clip_sources)
    write_tensors(path, tensors, metadata)


def _markers(family: ModelFamily) -> list[NewTensor]:
    """Tensors by which ComfyUI, Forge and others know a parameterisation that is not ε: in SDXL they see it nowhere else."""
    scheduler = family.load_part("scheduler").config
    learns_v = scheduler.get("prediction_type") == "v_prediction"
    found: dict[str, Tensor] = {}
    if "sigma_data" in scheduler:  # EDM's schedulers
        vae = family.load_config("vae")
        if learns_v:
            found = {f"edm_vpred.{end}": torch.tensor(scheduler[end]) for end in ("sigma_max", "sigma_min")}
        elif vae.get("latents_mean") and vae.get("latents_std"):
            found = {f"edm_{end}": torch.tensor(vae[f"latents_{end}"]).view(1, -1, 1, 1) for end in ("mean", "std")}
    elif learns_v:
        found = {"v_pred": torch.tensor([])} | (
            {"ztsnr": torch.tensor([])} if scheduler.get("rescale_betas_zero_snr") else {}
        )
    return [_new(name, value) for name, value in found.items()]


def _new(name: str, value: Tensor) -> NewTensor:
    """Return the stored value, in fp32."""
    value = value.float().contiguous()
    return NewTensor(name, "F32", [*value.shape], value.numel() * 4, functools.partial(as_bytes, value))


def read_checkpoint_denoiser(path: Path, family: ModelFamily) -> Mapping[str, Tensor]:
    """The denoiser's weights in a checkpoint under diffusers' names, by diffusers' own converter, mapped from the disk."""
    if family.checkpoint_layout is None:
        return _Mapped(open_tensors(path))
    return convert_ldm_unet_checkpoint(load_file(path), family.load_config(family.denoiser_part))


class _Mapped(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for."""

    def __init__(self, tensors: TensorFile) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        with self.tensors.path.open("rb") as file:
            return self.tensors.read(file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors.entries)

    def __len__(self) -> int:
        return len(self.tensors.entries)


def _one_each(rename: Callable[[str, dict[str, Any]], str]) -> Callable[..., dict[str, list[str]]]:
    return lambda names, config: {rename(name, config): [name] for name in names}


def _renamed(
    family: ModelFamily, part: str, prefix: str, sources: Callable[..., dict[str, list[str]]], merge: Merge | None = None
) -> Iterator[NewTensor]:
    """A component's tensors as a checkpoint has them: their bytes are read when they are written."""
    files = [open_tensors(file) for file in family.part(part).weights.files]
    where = {name: file for file in files for name in file.entries}
    for new, old in sources(where, family.load_config(part)).items():
        entry = where[old[0]].entries[old[0]]
        shape = [*entry["shape"]]
        shape[:1] = [shape[0] * len(old)] if shape else []
        transposed = new.endswith("text_projection")
        if part == "vae" and len(shape) == 2:  # attention is a 1x1 convolution there
            shape += [1, 1]
        size = sum(b - a for a, b in (where[name].entries[name]["data_offsets"] for name in old))
        read = functools.partial(_bytes, [(where[name], name) for name in old], transposed, merge)
        yield NewTensor(prefix + new, entry["dtype"], shape[::-1] if transposed else shape, size, read)


def _bytes(sources: list[tuple[TensorFile, str]], transposed: bool, merge: Merge | None) -> bytes | bytearray:
    data = bytearray()
    for tensors, name in sources:
        with tensors.path.open("rb") as file:
            if merge is None and not transposed:
                data += tensors.read_bytes(file, name)
                continue
            stored = tensors.read(file, name)
        value = stored.T if transposed else stored if merge is None else merge(name, stored)
        data += as_bytes(value.to(stored.dtype).contiguous())
    return data
