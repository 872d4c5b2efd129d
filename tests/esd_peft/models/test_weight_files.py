"""Which files hold a part's weights: those that the libraries themselves read, whatever else lies in the folder."""

import itertools
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from esd_peft.errors import UserError
from esd_peft.models.weight_files import PICKLED, find_weights, needed_weights

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
CANDIDATES = ["whole", "shards", "whole.fp16", "shards.fp16", "other stem"]


def tiny(library):
    """The smallest model of a library, and the name of one of its weights."""
    if library == "diffusers":
        return AutoencoderKL(block_out_channels=(8,), norm_num_groups=8), "decoder.conv_out.bias"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    return CLIPTextModel(CLIPTextConfig(**sizes)), "final_layer_norm.bias"


def put(folder, library, candidate, values, stem=None):
    """Weights under the names of a candidate."""
    what, _, variant = candidate.partition(".")
    stem, mark = stem or STEMS[library], f".{variant}" if variant else ""
    if what == "whole":
        save_file(values, folder / f"{stem}{mark}.safetensors", {"format": "pt"})
        return
    shard = f"{stem}{mark}-00001-of-00001.safetensors"
    save_file(values, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(values, shard)}
    (folder / f"{stem}.safetensors.index{mark}.json").write_text(json.dumps(index))


SETS = [there for count in range(1, len(CANDIDATES) + 1) for there in itertools.combinations(CANDIDATES, count)]


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("library", STEMS)
def test_the_files_are_those_that_the_library_reads(library, variant, tmp_path):
    model, name = tiny(library)
    for number, there in enumerate(SETS):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        (folder / f"{STEMS[library]}.safetensors").unlink()
        for mark, candidate in enumerate(there):
            values = {key: value.contiguous() for key, value in model.state_dict().items()}
            values[name] = torch.full_like(values[name], mark + 1)
            other = next(stem for key, stem in STEMS.items() if key != library) if candidate == "other stem" else None
            put(folder, library, "whole" if other else candidate, values, other)
        found = find_weights(folder, library, variant)
        if found is None:
            with pytest.raises(OSError, match="no file named"):
                type(model).from_pretrained(folder, use_safetensors=True, variant=None)
            continue
        read = type(model).from_pretrained(folder, use_safetensors=True, variant=found.variant).state_dict()[name]
        stored = next(tensors for file in found.files for key, tensors in load_file(file).items() if key == name)
        assert torch.equal(read, stored), there


def test_weights_from_another_place_are_refused(tmp_path):
    model, _ = tiny("transformers")
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a PEFT adapter"):
        needed_weights(tmp_path, "transformers")
    (tmp_path / "adapter_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(UserError, match="names other weights"):
        needed_weights(tmp_path, "transformers")


def test_an_index_under_its_old_name_is_refused(tmp_path):
    put(tmp_path, "diffusers", "whole.fp16", {"a": torch.zeros(1)})
    (tmp_path / "diffusion_pytorch_model.safetensors.fp16.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"rename it to diffusion_pytorch_model.safetensors.index.fp16.json"):
        needed_weights(tmp_path, "diffusers", "fp16")


def test_pickles_are_found_under_their_own_names(tmp_path):
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    assert find_weights(tmp_path, "transformers") is None
    for library, name in (("transformers", "pytorch_model.bin"), ("diffusers", "diffusion_pytorch_model.bin")):
        assert [file.name for file in find_weights(tmp_path, library, kind=PICKLED).files] == [name]
