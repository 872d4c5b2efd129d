"""Uploads to a hub of this machine: what goes there, what stays, and what is said before any work and after a failure."""

import shlex

import pytest
import torch
from huggingface_hub import ModelCard, constants

from esd_peft import EraseConfig, MergeConfig, UserError, erase, merge_adapter
from esd_peft.adapters.hub import check_upload
from esd_peft.options.merge import HubOptions
from hub import TOKEN, Account, accept_uploads
from runs import SHORTEST


@pytest.fixture
def account(monkeypatch):
    """On a hub that is asked in place of the real one."""
    account = Account()
    with accept_uploads(account) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield account


def check(name="erased"):
    return check_upload(HubOptions(push_to_hub=name))


def test_an_adapter_and_a_merged_model_are_uploaded_with_their_cards(account, small_sd, tmp_path, capsys):
    adapter = tmp_path / "erased"
    erase(EraseConfig(concept="circle", model=str(small_sd), output=adapter, push_to_hub="erased", **SHORTEST))
    said = capsys.readouterr().out
    assert "/me/erased; it is private until you make it public" in said
    files = account.repos["me/erased"]
    assert {*files} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "kohya_lora.safetensors",
                        "pytorch_lora_weights.safetensors"}  # fmt: skip
    assert all(content == (adapter / name).read_bytes() for name, content in files.items())
    card = files["README.md"].decode()
    assert '`pipe.load_lora_weights("me/erased")`' in card and "\n- circle\n" in card
    assert "concept-erasure" in ModelCard(card).data.tags and "push_to_hub" not in card
    merge_adapter(MergeConfig(adapter=adapter, output=tmp_path / "merged", push_to_hub="team/without"))
    merged = account.repos["team/without"]
    assert {"README.md", "erased.json", "model_index.json", "unet/config.json"} <= {*merged}
    assert ".esd_peft" not in merged and account.private == {"me/erased": True, "team/without": True}
    for content in (*files.values(), *merged.values()):
        assert str(tmp_path).encode() not in content and TOKEN.encode() not in content
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_upload_that_fails_loses_nothing_and_says_how_to_do_it_again(account, tmp_path):
    folder = tmp_path / "it is mine"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    repository = check("me/mine")
    account.full = True
    with pytest.raises(UserError, match="is finished, but not uploaded") as refused:
        repository.upload(folder, ("*.safetensors", "README.md"))
    command = shlex.split(str(refused.value).rpartition("; for that: ")[2])
    assert command == ["hf", "upload", "me/mine", str(folder), ".", "--include", "*.safetensors", "--include", "README.md",
                       "--private"]  # fmt: skip
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_cannot_work_is_said_before(account, monkeypatch):
    account.public = "me/public"
    for name, says in (
        ("other/erased", "--push-to-hub other/erased: the token is of me, team; name a repository of theirs"),
        ("a/b/c", "--push-to-hub 'a/b/c' is no name of a repository; write OWNER/NAME"),
    ):
        with pytest.raises(UserError, match=says):
            check(name)
    assert check("me/public").is_there and not check().is_there
    account.role = "read"
    with pytest.raises(UserError, match="--push-to-hub: the token may only read"):
        check()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 30)
    with pytest.raises(UserError, match="--push-to-hub: the hub does not know the token; run hf auth login"):
        check()
    assert not account.repos, "nothing is made"


def test_a_hub_that_is_not_there(account, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="--push-to-hub: the hub cannot be reached"):
        check()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--push-to-hub: the hub cannot be reached"):
        check()


def test_whoever_has_no_token_is_told_before_any_work(account, small_sd, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(torch, "manual_seed", None)  # nothing is computed
    with pytest.raises(UserError, match="--push-to-hub needs a token of the hub; run hf auth login, or set HF_TOKEN"):
        erase(EraseConfig(concept="circle", model=str(small_sd), output=tmp_path / "out", push_to_hub="me/out", **SHORTEST))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
