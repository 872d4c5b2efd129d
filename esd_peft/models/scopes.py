"""Layers of each scope, by diffusers' layer names."""


def cross_attention(scope: str, name: str) -> bool:
    """Match scopes of denoisers with cross-attention layers (`attn2`; `attn1` is self-attention): the paper's."""
    parts = name.split(".")
    if scope == "esd-x-strict":
        return "attn2" in parts and ("to_k" in parts or "to_v" in parts)
    attends = "attn2" in parts
    return {
        "esd-x": attends,
        "esd-x-ff": attends or bool({"ff", "ffn"} & {*parts}),
        "esd-u": not attends,
        "selfattn": "attn1" in parts,
        "full": True,
    }[scope]


ENTRANCES = {"context_embedder", "cap_embedder", "txt_in"}  # where token embeddings come in, as families call it
_TEXT_PROJECTIONS = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
_TEXT_FEED_FORWARD = {"ff_context", "txt_mlp"}


def joint_attention(scope: str, name: str) -> bool:
    """Match scopes of denoisers whose attention layers process text and image together (MMDiT and similar).

    - `esd-x-strict`: the layers whose only input is the prompt: `context_embedder` (token
      embeddings; `cap_embedder` in Z-Image, `txt_in` in Qwen-Image) and `text_embedder.linear_1` (pooled embedding). Keys
      and values of the text see the noise level and, from the second layer on, the image too. UCE edits the same two layers
      of FLUX.
    - `esd-x`: these, and the text's own projections in attention: those of an MMDiT's double layers, and in Z-Image, whose
      other layers have the same weights for both, those of `context_refiner`. `esd-x-ff`: its feed-forward layers, too.
    - `esd-u`: all else. `selfattn`: the image's projections in attention (in single layers: those of both).
    """
    parts = set(name.split("."))
    normed = name.startswith("cap_embedder.0")  # a norm in it, which Qwen-Image has outside: `txt_norm`
    entrance = bool(parts & ENTRANCES and not normed) or {"text_embedder", "linear_1"} <= parts
    refines = "context_refiner" in parts
    text = entrance or bool(parts & _TEXT_PROJECTIONS) or (refines and "attention" in parts)
    attends = bool(parts & {"attn", "attn2", "attention"}) and not text
    return {
        "esd-x-strict": entrance,
        "esd-x": text,
        "esd-x-ff": text or bool(parts & _TEXT_FEED_FORWARD) or (refines and "feed_forward" in parts),
        "esd-u": not text,
        "selfattn": attends,
        "full": True,
    }[scope]
