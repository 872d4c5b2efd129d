"""Images that show nothing are said where they are made, and are no images to judge."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from esd_peft.errors import UnusableImages
from esd_peft.models import open_family
from esd_peft.models.sampling import check_images, encode_prompts, make_images
from families import draw_small, save_family

CPU = torch.device("cpu")


def overflowing(model, force_upcast):
    """Let the VAE of the pipeline directory leave float16's range, but not float32's."""
    (file,) = (model / "vae").glob("*.safetensors")
    save_file({n: v * 1e5 if n.startswith("decoder.conv_in") else v for n, v in load_file(file).items()}, file)
    config = model / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": force_upcast}))
    return model


def images(family, autocast):
    family.num_inference_steps = 2
    embeds = encode_prompts(family, ["a circle"], CPU, torch.float16)
    pipe = family.pipeline(family.load_denoiser(torch.float16), CPU, torch.float16)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        return make_images(pipe, embeds, 1, 1, label="after")


@pytest.mark.parametrize("autocast", [False, True], ids=["half precision", "autocast"])
@pytest.mark.parametrize(("kind", "obeys"), [("sdxl", True), ("sd3", False)])
def test_force_upcast_is_obeyed_as_diffusers_does(kind, obeys, autocast, tmp_path, monkeypatch):
    draw_small(monkeypatch)
    family = open_family(str(overflowing(save_family(kind, tmp_path / kind), force_upcast=True)))
    if obeys:
        assert images(family, autocast).isfinite().all()
        assert family.decoding_dtype(torch.float16) == torch.float32 != family.decoding_dtype(torch.bfloat16)
    else:
        with pytest.raises(UnusableImages, match=r"images \(after\) are NaN"):
            images(family, autocast)
        assert family.decoding_dtype(torch.float16) == torch.float16


def test_a_vae_that_need_not_be_upcast_is_not(tmp_path, monkeypatch):
    draw_small(monkeypatch)
    family = open_family(str(overflowing(save_family("sdxl", tmp_path / "sdxl"), force_upcast=False)))
    with pytest.raises(UnusableImages, match=r"NaN and no numbers, .*--dtype float32"):
        images(family, autocast=False)
    assert family.decoding_dtype(torch.float16) == torch.float16


def test_one_image_of_one_colour_may_be_and_nothing_but_such_may_not():
    black, grey, red = (Image.new("RGB", (8, 8), colour) for colour in ("black", (128, 128, 128), "red"))
    drawn = Image.linear_gradient("L").convert("RGB")
    almost = grey.copy()
    almost.putpixel((0, 0), (129, 128, 128))
    check_images([black, drawn, red], "after")
    check_images(iter([drawn]), "after")
    for shown in ([black], [black, grey, red], [almost]):
        with pytest.raises(UnusableImages, match=r"images \(after\) are each of one colour only, .* no verdict"):
            check_images(shown, "after")
