"""Text encoders and tokenizers as every version of transformers, and other tools, read them.

transformers 5.6 took the prefix `text_model.` from the names in a CLIPTextModel. It reads the old names; earlier versions,
Invoke and ComfyUI do not read the new ones, and go on with random weights without a word. So the old names are written.
"""

import json
from pathlib import Path
from typing import Any

from esd_peft.io.paths import exists
from esd_peft.io.tensors import rename_tensors
from esd_peft.io.text import UnreadableError, read_json

_PREFIX = "text_model."
_OWN = ("embeddings.", "encoder.", "final_layer_norm.")


def write_for_every_version(pipeline: Path) -> None:
    """Rewrite the text encoders and tokenizers of a pipeline directory of ours in that form."""
    for config in pipeline.glob("text_encoder*/config.json"):
        if _map(config).get("architectures") == ["CLIPTextModel"]:
            for file in config.parent.glob("*.safetensors"):
                rename_tensors(file, _old_name)
            for index in config.parent.glob("*.safetensors.index.json"):
                values = _map(index)
                values["weight_map"] = {_old_name(name): file for name, file in values.get("weight_map", {}).items()}
                index.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for tokenizer in pipeline.glob("tokenizer*/tokenizer.json"):
        _write_slow_files(tokenizer)


def plain_tokenizer(part: Any) -> Any:
    """Return the tokenizer, which some pipelines store inside a processor of text and images (FLUX.2 dev)."""
    return getattr(part, "tokenizer", part)


def word_tokens(tokenizer: Any, text: str) -> set[int]:
    """Return the token ids of a text's words, unknown ones included, without those of a space."""
    blank = tokenizer(" ", add_special_tokens=False).input_ids
    return {*tokenizer(text, add_special_tokens=False).input_ids} - {*blank}


def control_tokens(tokenizer: Any, text: str) -> list[str]:
    """Return the special tokens that a text spells out, such as the end of a prompt.

    Padding and unknown tokens do not count if they may be words: Stable Diffusion 2 pads with exclamation marks.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = {*tokenizer.all_special_ids} - ({tokenizer.pad_token_id, tokenizer.unk_token_id} - ends)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys(ids) if i in special]


def whole_words(vocabulary: dict[str, int]) -> list[str]:
    """Return the tokens that are whole words, in the order of their ids: three letters or more, a to z.

    CLIP marks the end of a word; SentencePiece and byte-level BPE (T5, Gemma, Qwen) mark its beginning.
    """
    words = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        word = token.removesuffix("</w>") if token.endswith("</w>") else token[1:] if token[:1] in ("▁", "Ġ") else ""
        if len(word) >= 3 and word.isascii() and word.isalpha() and word.islower():
            words.append(word)
    return words


def _old_name(name: str) -> str:
    """Restore the prefix in names of the encoder's own weights; a projection never had one."""
    return _PREFIX + name if name.startswith(_OWN) else name


def _write_slow_files(tokenizer: Path) -> None:
    """`vocab.json` and `merges.txt`, from which CLIP's tokenizer is made where there is no fast one."""
    folder = tokenizer.parent
    kind = str(_map(folder / "tokenizer_config.json").get("tokenizer_class")).removesuffix("Fast")
    model = _map(tokenizer).get("model", {})
    if kind != "CLIPTokenizer" or model.get("type") != "BPE" or exists(folder / "vocab.json"):
        return
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def _map(path: Path) -> dict[str, Any]:
    try:
        return {**read_json(path)}
    except (UnreadableError, TypeError):  # loading it reports the error
        return {}
