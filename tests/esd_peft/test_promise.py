"""The promise, kept on the embedded pipeline: the concept goes, the rest stays, within the budget."""

import pytest

from esd_peft import EraseConfig, erase


@pytest.mark.parametrize("concept", ["circle", "striped"])
def test_default_erasure(tmp_path, concept):
    """One seed and one image a prompt; benchmarks/erasure.py measures three seeds on more images."""
    result = erase(EraseConfig(concept=concept, output=tmp_path / "erased", num_validation_images=1, device="cpu"))
    rates = result["concepts"][concept]
    assert rates["before"] >= 0.9
    assert rates["after"] <= 0.05  # 31 or 43 images: one or two of them
    losses = [r["before"] - r["after"] for r in result["others"].values()]
    assert sum(losses) / len(losses) <= 0.01
    assert max(losses) <= 0.05  # a shape has 24 images here: one of them
    assert result["nfe"] <= 6 * result["training_samples"]
    assert (tmp_path / "erased" / "before_after.png").is_file()
