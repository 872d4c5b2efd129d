"""The merged directory's README: readable by the hub, and unbroken by whatever a prompt holds."""

import json
import os
import shutil
import time

import pytest
import yaml
from huggingface_hub import ModelCard

from esd_peft import EraseConfig, MergeConfig, erase, merge_adapter
from esd_peft.adapters.model_card import base_licence, escape, public_config
from runs import SHORTEST

QUICK = SHORTEST | {"trajectories": 2, "max_train_steps": 2}
AWKWARD = "|<b>*`[x](y)#"  # no more tokens than the small encoder reads


@pytest.fixture(scope="module")
def card(small_sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    model = shutil.copytree(small_sd, folder / "private" / "sd")
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: rail-m\nlicense_link: LICENSE.md\ntags: [x]\n---\n# SD\n"
    )
    (model / "LICENSE.md").write_text("be good")
    erase(EraseConfig(concept=["circle", AWKWARD], model=str(model), output=folder / "a", **QUICK))
    result = json.loads((folder / "a" / "result.json").read_text())
    result["concepts"] = {AWKWARD: {"before": 0.98765, "after": 0.0}}
    (folder / "a" / "result.json").write_text(json.dumps(result))
    merge_adapter(MergeConfig(adapter=folder / "a", scale=0.5, output=folder / "merged"))
    assert (folder / "merged" / "LICENSE.md").read_text() == "be good"
    return folder / "merged" / "README.md"


def test_the_hub_reads_the_header(card):
    data = ModelCard.load(card).data
    assert (data.license, data.license_name, data.license_link) == ("other", "rail-m", "LICENSE.md")
    assert data.pipeline_tag == "text-to-image" and data.library_name == "diffusers" and "concept-erasure" in data.tags
    assert data.base_model is None  # a directory here means nothing elsewhere


def test_the_text_says_what_how_and_how_well(card):
    text = card.read_text()
    assert "\n- circle\n" in text and "scaled by 0.5" in text and "| 98.8% | 0.0% |" in text
    assert str(card.parents[1]) not in text, "a path of this machine"
    block = text.split("yaml\n", 1)[1]
    fence = text.split("yaml\n", 1)[0].rsplit("\n", 1)[1]
    config = yaml.safe_load(block.split(f"\n{fence}\n", 1)[0])
    assert config["prompts"]["concept"][1] == AWKWARD and config["pretrained"]["model"] == "sd"
    erased = json.loads((card.parent / "erased.json").read_text())
    assert erased["base"]["denoiser_sha256"]["diffusion_pytorch_model.safetensors"] in text


def test_prompts_do_not_break_the_markdown(card):
    outside = card.read_text().split("## How")[0]
    assert outside.count("\n---\n") == 1  # the header's end
    assert "<b>" not in outside.replace("\\<b\\>", "") and "\n# `code`" not in outside
    (row,) = [line for line in card.read_text().splitlines() if line.startswith(r"| \|")]
    assert row.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize(("text", "expected"), [("a_b", r"a\_b"), ("line\nline", "line line"), ("~x~", r"\~x\~")])
def test_escape(text, expected):
    assert escape(text) == expected


def test_a_public_config_names_no_place():
    config = {
        "pretrained": {"model": "/home/me/models/sd", "checkpoint_config": "/home/me/configs"},
        "prompts": {"concept": ["x"], "preserve": [], "preserve_file": "/home/me/keep.txt", "negative_guidance": 1.0},
        "training": {"reference": "/home/me/images", "seed": 0},
        "checkpoint": {"output": "/home/me/out", "overwrite": True},
        "runtime": {"device": "cuda:1", "report_to": "wandb"},
    }
    kept = {"pretrained": {"model": "sd"}, "prompts": {"concept": ["x"], "negative_guidance": 1.0}, "training": {"seed": 0}}
    assert public_config(config) == kept
    assert public_config({"pretrained": {"model": "owner/sd"}}) == {"pretrained": {"model": "owner/sd"}}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no header", b"---\n", b"---\nlicense: [1\n---\n", b"---\n- license\n---\n", b"---\njust words\n---\n",
        b"---\nlicense: 3\nlicense_name: [x]\nlicense_link: {a: b}\n---\n", b"---\nlicense: &a x\nlicense_name: *a\n---\n",
        b"---\n\xff\xfe\n---\n", b"---\nlicense: 2001-13-40\n---\n", b'---\nlicense: "a\\nb: c"\n---\n',
        b"---\n" + b"- [" * 50_000 + b"\n---\n", b"---\n" + b"a: b\n" * 10**6 + b"---\n",
    ],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_a_card_that_says_nothing_to_be_read_gives_no_licence(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    start = time.monotonic()
    assert base_licence(tmp_path) == {}
    assert time.monotonic() - start < 5


def test_a_card_elsewhere_is_not_read_and_a_pipe_not_waited_for(tmp_path):
    (tmp_path / "secret.md").write_text("---\nlicense: mine\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret.md")
    assert base_licence(tmp_path / "model") == {}
    (tmp_path / "model" / "README.md").unlink()
    os.mkfifo(tmp_path / "model" / "README.md")
    assert base_licence(tmp_path / "model") == {}
    (tmp_path / "model" / "README.md").unlink()
    (tmp_path / "model" / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# x")
    assert base_licence(tmp_path / "model") == {"license": "mit"}
