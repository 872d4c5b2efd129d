"""Weights of the transformer families under the names of their original code: what diffusers' converters read, backwards."""

import re

import torch
from torch import Tensor

Weights = dict[str, Tensor]
QKV = (["to_q", "to_k", "to_v"], "to_qkv")
ADDED_QKV = (["add_q_proj", "add_k_proj", "add_v_proj"], "add_qkv")
FLUX = {
    "^x_embedder": "img_in", "^context_embedder": "txt_in", "^proj_out": "final_layer.linear",
    r"^time_text_embed\.timestep_embedder": "time_in", r"^time_text_embed\.text_embedder": "vector_in",
    r"^time_text_embed\.guidance_embedder": "guidance_in", r"^time_guidance_embed\.timestep_embedder": "time_in",
    r"^time_guidance_embed\.guidance_embedder": "guidance_in",
    r"(time_in|vector_in|guidance_in)\.linear_1": r"\1.in_layer",
    r"(time_in|vector_in|guidance_in)\.linear_2": r"\1.out_layer",
    r"modulation_(img|txt)\.linear": r"modulation_\1.lin",
    r"single_stream_modulation\.linear": "single_stream_modulation.lin",
    r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"^single_transformer_blocks": "single_blocks", "^transformer_blocks": "double_blocks",
    r"(single_blocks.*)\.attn\.norm_q\.weight": r"\1.norm.query_norm.scale",
    r"(single_blocks.*)\.attn\.norm_k\.weight": r"\1.norm.key_norm.scale",
    r"(single_blocks\.\d+)\.norm\.linear": r"\1.modulation.lin", r"(single_blocks.*)\.proj_out": r"\1.linear2",
    r"(single_blocks.*)\.attn\.to_out": r"\1.linear2", r"attn\.to_qkv_mlp_proj": "linear1",
    r"norm1\.linear": "img_mod.lin", r"norm1_context\.linear": "txt_mod.lin",
    r"attn\.to_qkv": "img_attn.qkv", r"attn\.add_qkv": "txt_attn.qkv",
    r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
    r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
    r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale", r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
    r"attn\.to_out\.0": "img_attn.proj", r"attn\.to_add_out": "txt_attn.proj",
    r"ff\.(net\.0\.proj|linear_in)": "img_mlp.0", r"ff\.(net\.2|linear_out)": "img_mlp.2",
    r"ff_context\.(net\.0\.proj|linear_in)": "txt_mlp.0", r"ff_context\.(net\.2|linear_out)": "txt_mlp.2",
    r"(distilled_guidance_layer\.layers\.\d+)\.linear_1": r"\1.in_layer",
    r"(distilled_guidance_layer\.layers\.\d+)\.linear_2": r"\1.out_layer",
    r"(distilled_guidance_layer\.norms\.\d+)\.weight": r"\1.scale",
}  # fmt: skip
SD3 = {
    r"^pos_embed\.pos_embed": "pos_embed", r"^pos_embed\.proj": "x_embedder.proj",
    r"^time_text_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_text_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^time_text_embed\.text_embedder\.linear_1": "y_embedder.mlp.0",
    r"^time_text_embed\.text_embedder\.linear_2": "y_embedder.mlp.2",
    "^transformer_blocks": "joint_blocks", r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    "^proj_out": "final_layer.linear", r"norm1\.linear": "x_block.adaLN_modulation.1",
    r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"(attn2?)\.to_qkv": r"x_block.\1.qkv", r"attn\.add_qkv": "context_block.attn.qkv",
    r"attn\.norm_added_(q|k)": r"context_block.attn.ln_\1", r"(attn2?)\.norm_(q|k)": r"x_block.\1.ln_\2",
    r"(attn2?)\.to_out\.0": r"x_block.\1.proj", r"attn\.to_add_out": "context_block.attn.proj",
    r"ff\.net\.0\.proj": "x_block.mlp.fc1", r"ff\.net\.2": "x_block.mlp.fc2",
    r"ff_context\.net\.0\.proj": "context_block.mlp.fc1", r"ff_context\.net\.2": "context_block.mlp.fc2",
}  # fmt: skip
Z_IMAGE = {
    r"all_final_layer\.2-1": "final_layer", r"all_x_embedder\.2-1": "x_embedder", r"attention\.to_out\.0": "attention.out",
    r"attention\.norm_(q|k)": r"attention.\1_norm", r"attention\.to_qkv": "attention.qkv",
}  # fmt: skip
WAN = {
    r"time_embedder\.linear_1": "time_embedding.0", r"time_embedder\.linear_2": "time_embedding.2",
    r"text_embedder\.linear_1": "text_embedding.0", r"text_embedder\.linear_2": "text_embedding.2",
    "time_proj": "time_projection.1", r"condition_embedder\.": "", "attn1": "self_attn", "attn2": "cross_attn",
    r"\.to_out\.0": ".o", r"\.to_(q|k|v)": r".\1", "^scale_shift_table": "head.modulation",
    "scale_shift_table": "modulation", "^proj_out": "head.head", r"ffn\.net\.0\.proj": "ffn.0", r"ffn\.net\.2": "ffn.2",
    r"\.norm2\.": ".norm3.",
}  # fmt: skip
PIXART = {
    r"^pos_embed\.proj": "x_embedder.proj", r"^adaln_single\.linear": "t_block.1",
    r"^adaln_single\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^adaln_single\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"^caption_projection\.linear_": "y_embedder.y_proj.fc", "^scale_shift_table": "final_layer.scale_shift_table",
    "^proj_out": "final_layer.linear", "^transformer_blocks": "blocks", r"attn1\.to_qkv": "attn.qkv",
    r"attn2\.to_kv": "cross_attn.kv_linear", r"attn2\.to_q": "cross_attn.q_linear", r"attn1\.to_out\.0": "attn.proj",
    r"attn2\.to_out\.0": "cross_attn.proj", r"ff\.net\.0\.proj": "mlp.fc1", r"ff\.net\.2": "mlp.fc2",
}  # fmt: skip


def original_names(family: str, weights: Weights) -> Weights:
    """Return the weights of a family of `families.MAKERS` as its original code names and fuses them."""
    rules = {"sd3": SD3, "z-image": Z_IMAGE, "wan": WAN, "qwen-image": {}}.get(family.split(",")[0].split(" 2.2")[0], FLUX)
    if family == "pixart":
        attention = {name: value for name, value in weights.items() if "attn2" not in name}
        crossed = _fused({name: value for name, value in weights.items() if "attn2" in name}, ["to_k", "to_v"], "to_kv")
        unread = {"pos_embed": torch.zeros(1, 4, 32), "y_embedder.y_embedding": torch.zeros(300, 48)}
        return _renamed(_fused(attention, *QKV) | crossed, PIXART) | unread
    if rules in (WAN, {}):
        return _renamed(weights, rules)
    if family.startswith(("flux", "sd3")):
        last = max((n for n in weights if "norm1_context.linear" in n and rules is SD3), default="norm_out.").rpartition(
            "."
        )[0]
        swapped = ("norm_out.linear.", f"{last}.")
        weights = {n: _swapped(value) if n.startswith(swapped) else value for n, value in weights.items()}
    for names, fused in (QKV, ADDED_QKV):
        weights = _fused(weights, names, fused)
    if family in ("flux dev", "flux schnell", "chroma"):
        attentions = {name.replace("attn.to_qkv", "to_qkv") if name.startswith("single") else name: value
                      for name, value in weights.items()}  # fmt: skip
        weights = _fused(attentions, ["to_qkv", "proj_mlp"], "linear1")
    return _renamed(weights, rules)


def _renamed(weights: Weights, rules: dict[str, str]) -> Weights:
    def renamed(name: str) -> str:
        for pattern, new in rules.items():
            name = re.sub(pattern, new, name)
        return name

    return {renamed(name): value for name, value in weights.items()}


def _fused(weights: Weights, names: list[str], fused: str) -> Weights:
    """Put the layers `names` of each module one below the other, as one layer `fused`; only where all are there."""
    found = {}
    for name, value in weights.items():
        module = next((module for module in names if f".{module}." in name), None)
        siblings = [name.replace(f".{module}.", f".{other}.") for other in names]
        if module is None or any(sibling not in weights for sibling in siblings):
            found[name] = value
        elif module == names[0]:
            found[name.replace(f".{module}.", f".{fused}.")] = torch.cat([weights[sibling] for sibling in siblings])
    return found


def _swapped(value: Tensor) -> Tensor:
    return torch.cat([*value.chunk(2)][::-1])
