"""Images on disk: kept, gone on with, and not mistaken for others."""

import pytest
import torch
from PIL import Image

from esd_peft.errors import UserError
from esd_peft.evaluation.image_cache import ImageCache


def opened(folder, overwrite=False, **made_with):
    cache = ImageCache(folder, {"prompts": ["ä cat"], "weights": {"a": "1"}} | made_with)
    cache.open(overwrite)
    return cache


def test_images_are_kept_and_gone_on_with(tmp_path):
    cache = opened(tmp_path / "before")
    places = [(0, 0), (0, 1), (12345, 0)]
    assert cache.missing(places) == places
    pixels = torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))
    cache.add((0, 1), pixels)
    again = opened(tmp_path / "before")
    assert again.missing(places) == [(0, 0), (12345, 0)]
    read = torch.tensor([*again.read((0, 1)).tobytes()]).reshape(4, 6, 3).permute(2, 0, 1) / 255
    assert (read - pixels).abs().max() <= 0.5 / 255 + 1e-6


def test_other_models_or_options_are_refused_and_overwritten_when_told(tmp_path):
    opened(tmp_path / "before").add((0, 0), torch.zeros(3, 2, 2))
    with pytest.raises(
        UserError, match=r"--output holds .*before, made by another model or with other options.*--overwrite"
    ):
        opened(tmp_path / "before", prompts=["a dog"])
    assert opened(tmp_path / "before").missing([(0, 0)]) == []
    assert opened(tmp_path / "before", overwrite=True, prompts=["a dog"]).missing([(0, 0)]) == [(0, 0)]


def test_a_folder_that_is_not_a_cache_is_left_alone(tmp_path):
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "mine.png").write_text("precious")
    with pytest.raises(UserError, match="--overwrite"):
        opened(tmp_path / "before")
    assert (tmp_path / "before" / "mine.png").is_file()


def test_a_damaged_image(tmp_path):
    cache = opened(tmp_path / "before")
    cache.add((0, 0), torch.zeros(3, 2, 2))
    cache.path((0, 0)).write_text("no image")
    with pytest.raises(UserError, match=r"which cannot be read .*remove it"):
        cache.read((0, 0))
    cache.add((0, 0), torch.zeros(3, 2, 2))
    assert isinstance(cache.read((0, 0)), Image.Image)
