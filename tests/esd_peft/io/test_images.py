"""Folders of images that anybody may have filled: images, or one sentence, soon and in little memory."""

import io
import os
import shutil
import struct
import zlib

import pytest
from PIL import Image

from esd_peft.errors import UserError
from esd_peft.io.images import MOST_PIXELS, open_image
from esd_peft.io.pixels import read_images
from esd_peft.options.study import MakeStudyConfig
from esd_peft.study.make import make_study


def encoded(form, size=(20, 10), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, 77 if mode in "LP" else None).save(file, form, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    """A PNG that says it has that many pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


ROW = zlib.compress(bytes(61 * 10))
BAD = {
    "empty": b"",
    "text": b"no image",
    "bomb": png(30_000, 30_000, chunk(b"IDAT", zlib.compress(bytes(2**20)))),
    "just too large": png(MOST_PIXELS // 1024 + 1, 1024, chunk(b"IDAT", ROW)),
    "no pixels": png(0, 0),
    "negative": png(2**31 + 5, 7),
    "text bomb": png(20, 10, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 9)), chunk(b"IDAT", ROW)),
    "truncated png": encoded("PNG")[:-30],
    "truncated jpeg": encoded("JPEG")[:-300],
    "truncated webp": encoded("WEBP")[:-10],
    "damaged png": encoded("PNG").replace(b"IDAT", b"IDAX"),
    "gif": encoded("GIF"),
    "tiff": encoded("TIFF"),
    "bmp": encoded("BMP"),
    "ppm": encoded("PPM"),
    "ico": encoded("ICO", (32, 32)),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_files_that_are_no_images(content, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--reference .* cannot be read as an image \(.+\); remove it") as error:
        open_image(path, "--reference")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "circle"])
def test_what_is_no_file(kind, tmp_path):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "dangling": tmp_path / "no", "circle": path}[kind])
    with pytest.raises(UserError, match=r"--reference .*a.png cannot be read as an image"):
        read_images(tmp_path, (8, 8), "--reference")
    with pytest.raises(UserError, match=r"--condition .*a.png cannot be read as an image"):
        make_study(MakeStudyConfig(condition=[tmp_path], question="Q?", output=tmp_path.parent / "study"))
    assert not (tmp_path.parent / "study").exists()


MODES = {
    "PNG": ["RGB", "RGBA", "L", "P", "1", "I;16"],
    "JPEG": ["RGB", "L", "1", "CMYK"],
    "WEBP": ["RGB", "RGBA", "L", "P", "1"],
}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_images_of_every_kind(form, mode, tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(form, mode=mode))  # whatever its name says
    assert open_image(tmp_path / "a.jpg", "--reference").size == (20, 10)
    assert read_images(tmp_path, (8, 6), "--reference").shape == (1, 3, 8, 6)


def test_the_largest_image_is_read(tmp_path):
    Image.new("L", (MOST_PIXELS // 1024, 1024)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", "--reference").size[1] == 1024


def test_names_that_are_no_text(tmp_path):
    """A study tells images and conditions by their names."""
    for name in ("\udcffa", "b\x1b[2J"):
        with pytest.raises(UserError, match=r"--condition: .* is no character of a name or prompt; leave it out"):
            MakeStudyConfig(condition=[tmp_path / name], question="Q?", output=tmp_path / "study")
    (tmp_path / "c").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "c" / "x.png")
    shutil.copyfile(tmp_path / "c" / "x.png", tmp_path / "c" / "\udcfe\n=1.png")
    record = make_study(MakeStudyConfig(condition=[tmp_path / "c"], question="Q?", output=tmp_path / "study"))
    assert record["conditions"] == ["c"]
    assert {item["file"] for item in record["items"].values()} == {"x.png", r"\udcfe\n=1.png"}
    (tmp_path / "study" / "key.json").read_text(encoding="utf-8")
