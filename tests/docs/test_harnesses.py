"""What docs/harnesses.md says of merged models, with the harnesses' own code where it is installed."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.worlds import WORLDS

PAGE = (Path(__file__).parents[2] / "docs" / "harnesses.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The page's one block in that language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `merged`, from which "circle" has been erased a little."""
    folder = tmp_path_factory.mktemp("harness")
    quick = {"num_validation_images": 0, "max_train_steps": 0, "trajectories": 1}
    erase(EraseConfig(concept="circle", output=folder / "erased", **quick))
    merge_adapter(MergeConfig(adapter=folder / "erased", output=folder / "merged"))
    return folder


def test_the_unet_file_is_a_state_dict_of_the_base_s_unet(folder, monkeypatch):
    monkeypatch.chdir(folder)
    exec(block("python"), {})
    base = UNet2DConditionModel.from_pretrained(WORLDS["shapes"].pipeline / "unet", dtype=torch.float32)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    base.load_state_dict(torch.load("unet.pt", map_location="cpu"))  # as UnlearnDiffAtk and HUB do
    changed = {name for name, value in base.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("attn2" in name for name in changed)


def test_eval_unlearn_draws_from_the_merged_directory_and_reports(folder, monkeypatch):
    registry = pytest.importorskip("eval_unlearn.registry", reason='not installed: pip install -e ".[harnesses]"')
    runner = pytest.importorskip("eval_unlearn.runners.single_benchmark_runner")
    types = pytest.importorskip("eval_unlearn.types")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    seen = []

    @registry.register_metric("count_images")
    class CountImages:
        """In the place of their metrics, which download their judges."""

        def load_dataset(self):
            return [types.Dataset(["a red circle", "a blue square"], {"source": "ours"})]

        def update(self, images, prompts, metadata):
            seen.extend(images)

        def compute(self):
            return types.MetricResult("count", len(seen))

    config = json.loads(block("json"))
    technique = config["technique"]
    options = technique["config"] | {"device": "cpu", "num_inference_steps": 2}
    report = runner.SingleBenchmarkRunner(technique["name"], "count_images", options, {}, config["output_dir"], 0).run()
    assert [image.size for image in seen] == [(32, 32)] * 2
    assert report["metric_result"]["value"] == 2
    for metric in config["metrics"]:
        assert registry.get_metric(metric["name"]), metric
