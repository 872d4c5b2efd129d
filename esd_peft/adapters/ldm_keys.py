"""Names of the weights of Stable Diffusion 1.x, 2.x and XL in single-file checkpoints.

diffusers converts from these names (`diffusers.loaders.single_file_utils`). For the opposite direction it has only the
tables that this module reads.

The names follow the original code's module lists: a block's layers are counted through the whole network.
"""

from collections.abc import Iterable
from typing import Any

from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",  # of files from before diffusers 0.17
}  # fmt: skip
_OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet_name(name: str, config: dict[str, Any]) -> str:
    """The UNet's weight `name`, without the checkpoint's prefix. `config` is the UNet's."""
    tables = DIFFUSERS_TO_LDM_MAPPING["unet"]
    fixed = tables["layers"] | tables["class_embed_type"] | tables["addition_embed_type"]
    if name in fixed:
        return fixed[name]
    stage, *rest = name.split(".")
    if stage == "mid_block":
        module, index, *tail = rest
        place = f"middle_block.{2 * int(index) + (module == 'attentions')}"
    else:
        number, module, index, *tail = rest
        block, layers = int(number), config["layers_per_block"] + 1
        if module == "downsamplers":
            place, tail = f"input_blocks.{(block + 1) * layers}.0.op", tail[1:]
        elif module == "upsamplers":
            after = 2 if "CrossAttn" in config["up_block_types"][block] else 1
            place, tail = f"output_blocks.{(block + 1) * layers - 1}.{after}.conv", tail[1:]
        else:
            side, first = ("input_blocks", 1) if stage == "down_blocks" else ("output_blocks", 0)
            place = f"{side}.{first + block * layers + int(index)}.{int(module == 'attentions')}"
    if module == "resnets":
        tail[0] = _RESNET[tail[0]]
    return ".".join([place, *tail])


def vae_name(name: str, config: dict[str, Any]) -> str:
    """The VAE's weight `name`, without the checkpoint's prefix. `config` is the VAE's."""
    fixed = DIFFUSERS_TO_LDM_MAPPING["vae"]
    if name in fixed:
        return fixed[name]
    side, stage, *rest = name.split(".")
    if stage == "mid_block":
        module, index, *tail = rest
        if module == "attentions":
            *layer, last = tail
            return f"{side}.mid.attn_1.{_VAE_ATTENTION['.'.join(layer)]}.{last}"
        place = f"{side}.mid.block_{int(index) + 1}"
    else:
        number, module, index, *tail = rest
        block, way = int(number), stage.removesuffix("_blocks")
        if way == "up":  # counted from the other end
            block = len(config["up_block_types"]) - 1 - block
        place = f"{side}.{way}.{block}." + (f"block.{index}" if module == "resnets" else f"{way}sample")
    return ".".join([place, *tail]).replace("conv_shortcut", "nin_shortcut")


def clip_sources(names: Iterable[str], config: dict[str, Any]) -> dict[str, list[str]]:
    """A text encoder's weights in a checkpoint: name → the weights here, which lie one after the other in it.

    OpenAI's CLIP keeps its names; OpenCLIP, known by its "gelu", has q, k and v in one. `config` is the encoder's.
    """
    if config.get("hidden_act") != "gelu":
        return {f"transformer.text_model.{name.removeprefix('text_model.')}": [name] for name in names}
    sources: dict[str, list[str]] = {}
    for name in sorted(names):  # q after k: put right below
        if not name.endswith("position_ids"):
            sources.setdefault(f"model.{_open_clip_name(name)}", []).append(name)
    order = ["q_proj", "k_proj", "v_proj"]
    return {new: sorted(old, key=lambda n: next((i for i, part in enumerate(order) if part in n), 0))
            for new, old in sources.items()}  # fmt: skip


def _open_clip_name(name: str) -> str:
    fixed = DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"]
    full = name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
    if full in fixed:
        return fixed[full]
    _, _, _, index, *tail = full.split(".")
    layer, last = ".".join(tail[:-1]), tail[-1]
    if layer.startswith("self_attn.") and layer != "self_attn.out_proj":
        return f"transformer.resblocks.{index}.attn.in_proj_{last}"
    return f"transformer.resblocks.{index}.{_OPEN_CLIP[layer]}.{last}"
