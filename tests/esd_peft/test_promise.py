"""The promise, kept on an embedded pipeline: the concept goes, the rest stays, within the budget."""

from esd_peft import EraseConfig, erase


def test_default_erasure(tmp_path):
    """One seed and one image a prompt; benchmarks/erasure.py measures more of each, in a world that is less easy."""
    result = erase(EraseConfig(concept="circle", output=tmp_path / "erased", num_validation_images=1, device="cpu"))
    groups = result["prompt_groups"]
    assert groups["paraphrases"]["before"]["share"] >= 0.9
    assert groups["paraphrases"]["after"]["share"] <= 0.1 and groups["training"]["after"]["share"] <= 0.15  # two images
    assert groups["unrelated"]["lost"] <= 0.05 and groups["retain_set"]["lost"] <= 0.05
    assert result["nfe"] <= 6 * result["training_samples"]
    assert (tmp_path / "erased" / "before_after.png").is_file()
