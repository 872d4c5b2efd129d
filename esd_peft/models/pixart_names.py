"""PixArt's weights under the names of its original code, for which diffusers has no converter among its loaders."""

import re
from typing import Any

from torch import Tensor

_NAMES = {
    r"^x_embedder\.proj": "pos_embed.proj",
    r"^t_embedder\.mlp\.0": "adaln_single.emb.timestep_embedder.linear_1",
    r"^t_embedder\.mlp\.2": "adaln_single.emb.timestep_embedder.linear_2",
    r"^t_block\.1": "adaln_single.linear",
    r"^y_embedder\.y_proj\.fc": "caption_projection.linear_",
    r"^final_layer\.scale_shift_table": "scale_shift_table",
    r"^final_layer\.linear": "proj_out",
    r"^blocks\.": "transformer_blocks.",
    r"\.cross_attn\.q_linear\.": ".attn2.to_q.",
    r"\.cross_attn\.proj\.": ".attn2.to_out.0.",
    r"\.attn\.proj\.": ".attn1.to_out.0.",
    r"\.mlp\.fc1\.": ".ff.net.0.proj.",
    r"\.mlp\.fc2\.": ".ff.net.2.",
}
# layers that are one in the original: that one's name, and diffusers' of the rows from the top down
_FUSED = {
    ".attn.qkv.": (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    ".cross_attn.kv_linear.": (".attn2.to_k.", ".attn2.to_v."),
}
# a table of positions, which is computed here, and the empty caption of training
_LEFT_OUT = ("pos_embed", "y_embedder.y_embedding")


def from_original_pixart(checkpoint: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the weights under diffusers' names; the signature is that of diffusers' own converters."""
    found = {}
    for name, value in checkpoint.items():
        if name in _LEFT_OUT:
            continue
        for pattern, new in _NAMES.items():
            name = re.sub(pattern, new, name)
        fused = next((layer for layer in _FUSED if layer in name), None)
        parts = _FUSED[fused] if fused else ("",)
        for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
            found[name.replace(fused, part) if fused else name] = rows
    return found
