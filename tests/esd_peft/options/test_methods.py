"""Every option is read by a method or refused by it, and only --method chooses one."""

import pytest
import yaml

from esd_peft import EraseConfig, UserError, erase
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.options.base import Options, flag, groups_of, readers
from esd_peft.training.method import METHODS
from families import save_family

FIELDS = {name: field for group in groups_of(EraseConfig).values() for name, field in group.model_fields.items()}
OF_SOME = {name: readers(field) for name, field in FIELDS.items() if readers(field)}  # which some methods do not read
# values of each, zeros and what defaults come to among them
VALUES = {
    "map_to": ["owl"],
    "negative_guidance": [0.0, 1.0],
    "closed_form": [False, True],
    "rollout": ["teacher", "mixed", "student"],
    "trajectories": [8],
    "num_inference_steps": [25],
    "guidance_scale": [0.0, 3.0],
    "buffer_refresh_interval": [0],
    "preservation_ratio": [0.125],
    "unprompted_guidance": [0.0, 3.0],
}
OTHERS = [  # of options that every method reads, other values than the defaults; some need others beside them
    {"erase_from": "hat"}, {"also_erase": ["vulpes"]}, {"prompt_templates": "bare"}, {"preserve": ["an owl"]},
    {"scope": "esd-x-strict"}, {"adapter_type": "none"}, {"adapter_type": "lokr"}, {"rank": 4}, {"alpha": 2.0},
    {"rollout_batch_size": 2}, {"max_train_steps": 40}, {"train_batch_size": 4}, {"learning_rate": 1e-4},
    {"lr_scheduler": "linear"}, {"optimizer": "AdamW8bit"}, {"seed": 3},
    {"per_device_batch_size": 2}, {"gradient_checkpointing": True}, {"offload": True}, {"quantize": "nf4"},
    {"memory_budget": "12GiB"}, {"plan": True}, {"device": "cpu"}, {"dtype": "bfloat16"}, {"compile": "off"},
    {"report_to": "tensorboard"}, {"output": "there"}, {"overwrite": True}, {"resume": True},
    {"num_validation_images": 1}, {"validation_prompt": ["a fox"]},
    {"push_to_hub": "me/it"},
]  # fmt: skip
WHICH_MODEL = {  # options that say which model it is, and how it is read
    "model", "revision", "variant", "checkpoint_config", "allow_pickle", "resolution", "max_sequence_length",
}  # fmt: skip


@pytest.fixture(scope="module")
def emoji():
    return open_family("emoji")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**options):
    return EraseConfig(**{"concept": "fox", "model": "emoji"} | options)


def test_there_are_no_more_than_fifty_options():
    assert len(FIELDS) <= 50, "one more replaces another, or has a measurement that shows what it is for"


def test_the_tables_have_every_option():
    assert VALUES.keys() == OF_SOME.keys()
    assert {name for options in OTHERS for name in options} == FIELDS.keys() - VALUES - WHICH_MODEL - {"concept", "method"}
    assert {method for known in OF_SOME.values() for method in known} <= METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", VALUES)
def test_an_option_is_read_or_refused_whatever_its_value(name, method, emoji, here):
    for value in VALUES[name]:
        given = config(method=method, **{name: value})
        if method in OF_SOME[name]:
            assert str(resolve(given, emoji)[0].flat()[name]) == str(value)
            continue
        with pytest.raises(UserError) as error:
            resolve(given, emoji)
        named = " or ".join(f"--method {other}" for other in OF_SOME[name])
        assert str(error.value) == f"{flag(name)} is not read by --method {method}; leave it out, or add {named}"


@pytest.mark.parametrize("own", [{"negative_guidance": 2.0}, {"map_to": "owl"}, {"weight": 2.0}], ids=str)
def test_so_are_a_concepts_own(own, emoji):
    concept = [{"name": "fox", **own}]
    resolve(config(concept=concept, method="layers"), emoji)
    (name,) = own
    with pytest.raises(UserError, match=f"{flag(name)} is not read by --method contrastive; leave it out"):
        resolve(config(concept=concept, method="contrastive"), emoji)


@pytest.mark.parametrize("options", [*OTHERS, *({name: VALUES[name][-1]} for name in VALUES)], ids=str)
def test_no_other_option_changes_the_method(options, emoji, here):
    """What the default does not read is refused, and leads to no other method."""
    (name, *_) = options
    if "layers" in OF_SOME.get(name, METHODS):
        assert resolve(config(**options), emoji)[0].training.method == "layers"
    else:
        with pytest.raises(UserError, match=f"^{flag(name)} is not read by --method layers; leave it out, or add --method "):
            resolve(config(**options), emoji)


def test_what_the_layers_do_not_run_is_not_compiled(emoji):
    assert resolve(config(method="layers"), emoji)[0].runtime.compile == "off"
    with pytest.raises(UserError, match="--compile on compiles whole blocks, which --method layers does not run"):
        resolve(config(compile="on"), emoji)
    assert resolve(config(method="denoiser", compile="on"), emoji)[0].runtime.compile == "on"


def test_the_model_alone_chooses_the_default(emoji, tmp_path):
    assert resolve(config(), emoji)[0].training.method == "layers"
    assert resolve(EraseConfig(concept="circle"), open_family("shapes"))[0].training.method == "trajectories", "39 words"
    path = str(save_family("flux dev", tmp_path / "flux"))
    family = open_family(path)
    words = emoji.whole_words()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(family), "whole_words", lambda self: words)
        assert resolve(EraseConfig(concept="circle", model=path), family)[0].training.method == "denoiser"
        with pytest.raises(UserError, match=r"--method layers needs separable cross-attention, .*; use --method denoiser"):
            resolve(EraseConfig(concept="circle", model=path, method="layers"), family)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_of_a_run_holds_what_its_method_reads_and_resolves_to_itself(method, here):
    short = {"rank": 2, "max_train_steps": 1, "num_validation_images": 0, "device": "cpu"}
    short |= {} if method == "contrastive" else {"num_inference_steps": 2}
    output = here / "erased"
    result = erase(EraseConfig(concept="circle", model="shapes", method=method, output=output, **short))
    groups = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8"))
    held = {name for group in groups.values() for name in group}
    unread = {name for name, known in OF_SOME.items() if method not in known}
    assert not held & unread and FIELDS.keys() - OF_SOME.keys() <= held
    again = EraseConfig(**groups)
    assert resolve(again, open_family("shapes"))[0] == again
    assert again.model_dump(mode="json") == groups == result["config"]


def test_every_group_says_what_reads_it():
    """`ReadBy` names methods that there are, and never all of them: that is what an option says that has none."""
    for group in groups_of(EraseConfig).values():
        assert issubclass(group, Options)
        for name, field in group.model_fields.items():
            known = readers(field)
            assert {*known} < METHODS.keys() and len(known) == len({*known}), name
