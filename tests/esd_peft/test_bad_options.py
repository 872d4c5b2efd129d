"""Every option, given something that cannot work: one sentence that names it, exit code 2, nothing written."""

import importlib
import json
import re
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import commands
from esd_peft.adapters.options import MergeConfig
from esd_peft.cli import run_command
from esd_peft.config import EraseConfig
from esd_peft.evaluation.options import EvaluateConfig
from esd_peft.options import groups_of
from esd_peft.study.config import AnalyseStudyConfig, MakeStudyConfig

LORA = {f"base_model.model.time_embedding.linear_1.{name}.weight": torch.zeros(size) for name, size in
        (("lora_A", (1, 64)), ("lora_B", (256, 1)))}  # fmt: skip
COMMANDS = {
    "erase": EraseConfig,
    "merge_adapter": MergeConfig,
    "evaluate": EvaluateConfig,
    "study make": MakeStudyConfig,
    "study analyse": AnalyseStudyConfig,
}
MISTAKES = [  # of erase; the concept is circle where none is named
    ("", "--concept: name what to erase, for example --concept circle"),
    ("--concept", "--concept expected an argument|--concept"),
    ("--concept=", "--concept.*name what to erase"),
    ("--concept zebra", "--concept 'zebra'.*never seen.*use its words"),
    ("--concept the", "--concept 'the' names nothing the embedded pipeline draws; it draws circle"),
    ("--concept circle --concept circle", "--concept: circle is named twice; name each concept once"),
    ("--erase-from=", "--erase-from: say what, or leave the option out"),
    ("--erase-from zebra", "--erase-from 'zebra'.*use its words"),
    ("--erase-from circle", "--concept 'circle circle' is the same as"),
    ("--map-to=", "--map-to: say what, or leave the option out"),
    ("--map-to zebra", "--map-to 'zebra'.*use its words"),
    ("--map-to circle", "--map-to 'circle' names what is to be erased; map it to something that stays"),
    ("--prompt-templates many", "--prompt-templates.*bare"),
    ("--preserve=", "--preserve: say what, or leave the option out"),
    ("--also-erase zebra", "--also-erase 'zebra'.*use its words"),
    ("--also-erase a", "--also-erase 'a' names nothing"),
    (
        "--concept red --concept star --also-erase square",
        "--also-erase does not say of which --concept; in YAML each has its own",
    ),
    ("--also-erase square --preserve square", "--preserve 'square' names what is to be erased; leave it out or reword it"),
    ("--preserve zebra", "--preserve 'zebra'.*use its words"),
    ("--preserve circle", "--preserve 'circle' names what is to be erased; leave it out or reword it"),
    ("--preserve-file nowhere.txt", "--preserve-file nowhere.txt cannot be read"),
    ("--preserve-file .", "--preserve-file . cannot be read"),
    ("--preserve-file {text}", "--preserve-file .* holds no prompt; write one a line"),
    ("--preserve-file {binary}", "--preserve-file .* cannot be read"),
    ("--resolution 64", "--resolution: the embedded pipeline draws 32 pixels; leave it out"),
    ("--max-sequence-length 16", "--max-sequence-length is for T5 and language models, .*; leave it out"),
    ("--model nowhere", "--model nowhere is not a diffusers pipeline directory: .* pipelines are shapes, emoji"),
    ("--model=", "--model.* is not a diffusers pipeline directory"),
    ("--model {text}", "--model .* is a pickle, which can run code; use a .safetensors file"),
    ("--model {text} --variant fp16", "--variant names files of a directory or a hub repository; leave it out"),
    ("--model nowhere --revision main", "--revision works with a hub id only; leave it out"),
    ("--model nowhere --checkpoint-config x", "--checkpoint-config works with a single-file checkpoint only; leave it out"),
    ("--allow-pickle=maybe", "maybe"),
    ("--offload", "--offload needs --gradient-checkpointing; add it"),
    ("--evaluate --num-validation-images 0", "--evaluate needs images; leave --num-validation-images 0 out"),
    (
        "--validation-prompt circle --num-validation-images 0",
        "--validation-prompt needs images; leave --num-validation-images 0 out",
    ),
    ("--hub-model-id me/it", "--hub-model-id is for --push-to-hub; add that or leave it out"),
    ("--hub-private", "--hub-private is for --push-to-hub; add that or leave it out"),
    ("--push-to-hub --hub-model-id a/b/c", "--hub-model-id 'a/b/c' is no name of a repository; write OWNER/NAME"),
    ("--validation-prompt=", "--validation-prompt: say what to look at, or leave the option out"),
    ("--validation-prompt zebra", "--validation-prompt 'zebra'.*use its words"),
    ("--validation-steps 5", "--validation-steps needs a --validation-prompt to look at; add one or leave it out"),
    ("--validation-prompt circle --validation-steps 0", "--validation-steps.*greater than or equal to 1"),
    ("--validation-prompt circle --validation-steps -5", "--validation-steps"),
    ("--output .", "--output . is or holds .*; name another directory"),
    ("--output {text}", "--output .* is a file; name a directory"),
    ("--output /proc/out", "--output /proc/out cannot be written.*; name a writable directory"),
    ("--output {full}", "--output .* is not empty; name another directory or add --overwrite"),
    ("--output /proc --overwrite", "--output /proc is a mount point"),
    ("--overwrite maybe", "maybe"),
    ("--augment-prompts maybe", "--augment-prompts"),
    (
        "--augment-prompts True --attention-steps 5",
        "--augment-prompts True learns in --max-train-steps, .*; leave these out",
    ),
    (
        "--augment-prompts True --max-train-steps 0",
        "--augment-prompts True learns in --max-train-steps, .*; leave these out",
    ),
    (
        "--augment-prompts True --preservation-ratio 0",
        "--augment-prompts needs samples that hold; raise --preservation-ratio",
    ),
    ("--augment-prompts True --robust 1", "--augment-prompts does not work with .*--robust"),
    ("--robust -1", "--robust.*greater than or equal to 0"),
    ("--robust 17", "--robust.*less than or equal to 16"),
    ("--robust twice", "--robust"),
    ("--robust 1 --stop-at 0.5", "--robust works with --objective esd and without --stop-at; leave one of them out"),
    ("--robust 2 --max-train-steps 4", "--robust 2 needs --max-train-steps of at least 5"),
    ("--scope esd-y", "--scope.*esd-x-strict"),
    ("--adapter-type lorra", "--adapter-type.*lora"),
    ("--rank 0", "--rank.*greater than or equal to 1"),
    ("--rank 2000", "--rank.*less than or equal to 1024"),
    ("--rank two", "--rank.*two"),
    ("--rank 2.5", "--rank"),
    ("--rank 4 --adapter-type none", "--rank and --alpha .*leave them out"),
    ("--closed-form perhaps", "perhaps"),
    ("--attention-steps -1", "--attention-steps.*greater than or equal to 0"),
    ("--attention-steps few", "--attention-steps.*few"),
    ("--attention-steps 9 --scope esd-u", "--attention-steps works with .* where cross-attention learns; leave it out"),
    ("--attention-steps 9 --objective contrastive", "--attention-steps works with --objective esd and"),
    ("--alpha 0", "--alpha.*greater than 0"),
    ("--alpha inf", "--alpha"),
    ("--objective distil", "--objective.*contrastive"),
    ("--reference here", "--reference works with --objective contrastive only; leave it out"),
    (
        "--objective contrastive --null-space 0 --reference nowhere",
        "--reference nowhere is no folder with images; name one",
    ),
    ("--negative-guidance -1", "--negative-guidance.*greater than or equal to 0"),
    ("--negative-guidance nan", "--negative-guidance"),
    ("--negative-guidance 1 --objective contrastive", "--negative-guidance works with --objective esd only; leave it out"),
    ("--preservation-ratio 1", "--preservation-ratio.*less than 1"),
    ("--preservation-ratio nan", "--preservation-ratio"),
    ("--preservation-ratio 0.5 --train-batch-size 1", "--preservation-ratio needs a --train-batch-size of at least 2"),
    ("--null-space 1", "--null-space.*less than 1"),
    ("--null-space 0.9 --adapter-type loha", "--null-space works with --adapter-type lora or none.*leave it out"),
    ("--min-timestep -1", "--min-timestep.*greater than or equal to 0"),
    ("--min-timestep 999 --num-inference-steps 4", "--min-timestep and --max-timestep leave no step"),
    ("--max-timestep 0", "--min-timestep must be below --max-timestep"),
    ("--max-timestep last", "--max-timestep.*last"),
    ("--snr-gamma 0", "--snr-gamma.*greater than 0"),
    ("--snr-gamma inf", "--snr-gamma"),
    ("--unprompted-guidance -1", "--unprompted-guidance.*greater than or equal to 0"),
    (
        "--unprompted-guidance 3 --train-batch-size 1",
        "--unprompted-guidance needs preservation samples; raise --pres",
    ),
    ("--unprompted-guidance 3 --objective contrastive", "--unprompted-guidance works with --objective esd only"),
    ("--stop-at 1", "--stop-at.*less than 1"),
    ("--stop-at -1", r"--stop-at must be above -η \(--negative-guidance\)"),
    ("--stop-at 0 --map-to square", "--stop-at does not work with --map-to; leave one of them out"),
    ("--rollout teachers", "--rollout.*student"),
    ("--trajectories 0", "--trajectories.*greater than or equal to 1"),
    ("--trajectories 1 --concept circle --concept red", "--trajectories must be at least the number of concepts, 2"),
    ("--preservation-trajectories -1", "--preservation-trajectories.*greater than or equal to 0"),
    ("--preservation-trajectories 2", "--preservation-trajectories needs something to preserve; add --preserve"),
    ("--num-inference-steps 0", "--num-inference-steps.*greater than or equal to 1"),
    ("--num-inference-steps 1001", "--num-inference-steps.*less than or equal to 1000"),
    ("--guidance-scale -1", "--guidance-scale.*greater than or equal to 0"),
    ("--guidance-scale nan", "--guidance-scale"),
    ("--guided-rollout-ratio 1.1", "--guided-rollout-ratio.*less than or equal to 1"),
    ("--rollout-batch-size 0", "--rollout-batch-size.*greater than or equal to 1"),
    ("--buffer-refresh-interval -1", "--buffer-refresh-interval.*greater than or equal to 0"),
    ("--max-train-steps 0 --closed-form False --attention-steps 0", "--max-train-steps 0 needs --attention-steps or"),
    ("--max-train-steps -1", "--max-train-steps.*greater than or equal to 0"),
    ("--max-train-steps many", "--max-train-steps.*many"),
    ("--train-batch-size 0", "--train-batch-size.*greater than or equal to 1"),
    ("--per-device-batch-size 0", "--per-device-batch-size.*greater than or equal to 1"),
    ("--learning-rate 0", "--learning-rate.*greater than 0"),
    ("--learning-rate nan", "--learning-rate"),
    ("--lr-scheduler sine", "--lr-scheduler.*cosine"),
    ("--lr-warmup-steps -1", "--lr-warmup-steps.*greater than or equal to 0"),
    ("--lr-warmup-steps 3 --lr-scheduler constant", "--lr-warmup-steps needs another --lr-scheduler"),
    ("--optimizer SGD", "--optimizer.*AdamW"),
    ("--max-grad-norm 0", "--max-grad-norm.*greater than 0"),
    ("--gradient-checkpointing perhaps", "perhaps"),
    ("--device cuda:99", "--device cuda:99 is not there.*use cpu"),
    ("--device tpu", "--device tpu is not a device; use auto, cpu, cuda|--device tpu is not supported"),
    ("--device meta", r"--device meta is not supported; use auto, cpu, cuda \(ROCm too\), xpu or mps"),
    ("--device mps", "--device mps is not there: PyTorch sees 0 MPS devices; use cpu"),
    ("--dtype float8", "--dtype.*bfloat16"),
    ("--quantize int4", "--quantize.*nf4"),
    ("--quantize nf4 --adapter-type lokr", "--quantize nf4 works with --adapter-type lora only"),
    ("--memory-budget lots", "--memory-budget.*12GiB, for example"),
    ("--memory-budget 1MiB", "--memory-budget 1.0 MiB is .* short.*give more, or take a smaller model"),
    (
        "--memory-budget 1GiB --objective contrastive --null-space 0",
        "--memory-budget works? with --objective esd only; leave",
    ),
    ("--plan --objective contrastive --null-space 0", "--plan and --memory-budget work with --objective esd only; leave"),
    ("--plan --model nowhere", "--model nowhere is not a diffusers pipeline"),
    ("--plan perhaps", "perhaps"),
    ("--compile yes", "--compile.*auto"),
    ("--checkpointing-steps 0", "--checkpointing-steps.*greater than or equal to 1"),
    ("--resume", "--resume: .* holds no checkpoint; leave --resume out"),
    ("--seed -1", "--seed.*greater than or equal to 0"),
    ("--seed 9223372036854775808", "--seed.*less than"),
    ("--num-validation-images -1", "--num-validation-images.*greater than or equal to 0"),
    ("--report-to mlflow", "--report-to.*tensorboard"),
    ("--report-to wandb", "--report-to wandb is not installed; pip install wandb"),
    ("--rnak 3", "--rnak"),
    ("leftover", "leftover"),
    ("--config", "--config needs a file"),
    ("--config nowhere.yaml", "--config nowhere.yaml cannot be read"),
    ("--config .", "--config . cannot be read"),
    ("--config {binary}", "--config .*"),
]
MERGES = [
    ("--adapter {adapter} --output out --unmerge", "--unmerge would bring the concept back"),
    ("--adapter {adapter} --base {text} --output out --variant fp16", "--variant names files of a directory"),
    ("--adapter {adapter} --base nowhere --output out --revision main", "--revision works with a hub id only"),
    (
        "--adapter {adapter} --base nowhere --output out --checkpoint-config x",
        "--checkpoint-config works with a single-file",
    ),
    ("--adapter {adapter} --output out --allow-pickle=maybe", "maybe"),
    ("--adapter {adapter} --output out --scale -1", "--scale: .* greater than 0"),
    ("--output out", "--adapter: name the directory that the erase command wrote"),
    ("--adapter nowhere", "--output"),
    ("--adapter nowhere --output out", "--adapter nowhere is not an adapter directory"),
    ("--adapter {text} --output out", "--adapter .* is not an adapter directory"),
    ("--adapter a --adapter a --output out", "--adapter: name each adapter once"),
    ("--adapter {full} --output {full} --overwrite", "--output .* is or holds"),
    ("--adapter {full} --output {text}", "--output .* is a file; name a directory"),
    ("--adapter {adapter} --base nowhere --output out", "--base nowhere is not a diffusers pipeline"),
    ("--adapter {adapter} --output out", "--base is missing, and --adapter .* does not say"),
    ("--adapter {adapter} --output out --verify perhaps", "perhaps"),
    (
        "--adapter {adapter} --output out --hub-model-id me/it",
        "--hub-model-id is for --push-to-hub; add that or leave it out",
    ),
    ("--adapter {adapter} --output out --hub-private", "--hub-private is for --push-to-hub; add that or leave it out"),
    (
        "--adapter {adapter} --output out --push-to-hub --hub-model-id a/b/c",
        "--hub-model-id 'a/b/c' is no name of a repository; write OWNER/NAME",
    ),
    ("--adapter {adapter} --output out.safetensors --push-to-hub", "--push-to-hub uploads a directory with its card"),
    ("--adapter {adapter} --output out --overwrite perhaps", "perhaps"),
]
EVALUATIONS = [  # of an adapter on the embedded pipeline, where none is named
    ("--erased nowhere", "--erased nowhere is not an adapter directory"),
    ("--erased {full}", "--erased .* is not an adapter directory"),
    ("--base nowhere", "--base nowhere is not a diffusers pipeline"),
    ("--suite nowhere", "--suite nowhere is not there; use .*concept"),
    ("--suite nowhere.yaml", "--suite nowhere.yaml is not there"),
    ("--suite csv", "--prompts FILE.csv is what this --suite needs"),
    ("--prompts {text}", "--prompts is of no use to this --suite"),
    ("--suite csv --prompts nowhere.csv", "--prompts nowhere.csv cannot be read"),
    ("--suite csv --prompts {text}", "--prompts .* has no column prompt"),
    ("--suite csv --prompts {binary}", "--prompts .* cannot be read"),
    ("--suite csv --prompts {prompts} --detector {full}", "--detector .* cannot be loaded"),
    ("--concept=", "--concept: say what was erased, or leave the option out"),
    ("--concept the", "--concept 'the' names nothing; say what was erased"),
    ("--concept zebra", "--concept 'zebra' is not in this --suite"),
    ("--output {text}", "--output .* is a file; name a directory"),
    ("--output .", "--output . is or holds"),
    ("--overwrite maybe", "maybe"),
    ("--resolution 64", "--resolution: the embedded pipeline draws 32 pixels; leave it out"),
    ("--max-sequence-length 16", "--max-sequence-length is for T5 and language models, .*; leave it out"),
    ("--seeds 0", "--seeds.*greater than or equal to 1"),
    ("--limit 0", "--limit.*greater than or equal to 1"),
    ("--num-inference-steps 1001", "--num-inference-steps.*less than or equal to 1000"),
    ("--guidance-scale nan", "--guidance-scale"),
    ("--batch-size 0", "--batch-size.*greater than or equal to 1"),
    ("--detector {full}", "--detector is of no use to this --suite"),
    ("--threshold 0.1", "--threshold.*greater than or equal to 0.25"),
    ("--clip {full}", "--clip .* cannot be loaded"),
    ("--lpips maybe", "maybe"),
    ("--reference {full}", "--reference and --features need each other"),
    ("--features {full}", "--reference and --features need each other"),
    ("--features {full} --reference nowhere", "--reference nowhere is no folder with images"),
    ("--features {full} --reference {images}", "--reference .* holds one image; FID and KID need a set"),
    ("--attack brute-force", "--attack.*fine-tuning"),
    ("--attack prefix --quantize nf4", "--attack does not work with --quantize; leave one of them out"),
    ("--attack prompts --suite csv --prompts {prompts}", "--attack needs a --suite"),
    ("--attack prefix --attack-steps 0", "--attack-steps.*greater than or equal to 1"),
    ("--attack-images 0", "--attack-images.*greater than or equal to 1"),
    ("--attack-examples 0", "--attack-examples.*greater than or equal to 1"),
    ("--attack prefix --attack-reference nowhere", "--attack-reference nowhere is no folder with images"),
    ("--attack-reference {full} --concept circle --concept red", "--attack-reference shows one concept"),
    ("--attack-prompts {text}", "--attack-prompts is for --attack prompts; add it or leave the file out"),
    ("--attack prompts --attack-prompts nowhere", "--attack-prompts nowhere cannot be read"),
    ("--attack prompts --attack-prompts {text}", "--attack-prompts .* holds no prompt; write one a line"),
    ("--attack prefix --prefix-tokens 17", "--prefix-tokens.*less than or equal to 16"),
    ("--device tpu", "--device tpu is not a device|--device tpu is not supported"),
    ("--dtype float8", "--dtype.*bfloat16"),
    ("--quantize int4", "--quantize.*nf4"),
    ("--seed -1", "--seed.*greater than or equal to 0"),
    ("leftover", "leftover"),
]
STUDIES = [  # made of one folder of one image, where none is named
    ("--condition nowhere", "--condition nowhere is no folder with images"),
    ("--condition {full}", "--condition .* is no folder with images"),
    ("--condition {images} --condition {images}", "--condition: two folders are named images.*rename one"),
    ("--question=", "--question: raters need to read something here"),
    ("--low=", "--low: raters need to read something here"),
    ("--high=", "--high: raters need to read something here"),
    ("--reference nowhere", "--reference nowhere is no folder with images"),
    ("--per-condition 0", "--per-condition.*greater than or equal to 1"),
    ("--max-size 15", "--max-size.*greater than or equal to 16"),
    ("--seed -1", "--seed.*greater than or equal to 0"),
    ("--output {text}", "--output .* is a file; name a directory"),
    ("--output {full}", "--output .* is not empty; name another directory or add --overwrite"),
    ("--output {images} --overwrite", "--output .* is or holds"),
    ("--overwrite maybe", "maybe"),
    ("leftover", "leftover"),
]
ANALYSES = [  # of one rater's answers, where none are named
    ("--answers nowhere", "--answers nowhere cannot be read"),
    ("--answers {binary}", "--answers .* cannot be read"),
    ("--answers {text}", "--answers .* has no column study; name a CSV file that the page saved"),
    ("--answers {answers} --answers {answers}", "--answers .*: another file holds answers of R; leave one of them out"),
    ("--key nowhere", "--key nowhere cannot be read"),
    ("--key {text}", "--key .* is no key of a study"),
    ("--output /proc/figures.json", "--output /proc/figures.json cannot be written|/proc/figures.json"),
    ("--output {full}", "--output .* is a directory; name a file in it"),
    ("--seed -1", "--seed.*greater than or equal to 0"),
    ("leftover", "leftover"),
]
USUAL = {  # options of a line that does not name them
    "erase": {"--concept": "circle"},
    "evaluate": {"--erased": "{adapter}", "--base": "shapes", "--concept": "circle"},
    "study make": {"--condition": "{images}", "--question": "Round?"},
    "study analyse": {"--answers": "{answers}", "--key": "{key}"},
}
TABLES = {
    "erase": MISTAKES,
    "merge_adapter": MERGES,
    "evaluate": EVALUATIONS,
    "study make": STUDIES,
    "study analyse": ANALYSES,
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Files and folders that the mistakes name; the working directory is empty."""
    here = tmp_path / "here"
    for folder in (here, tmp_path / "full", tmp_path / "adapter", tmp_path / "images"):
        folder.mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "text").write_text("# a comment\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "target_modules": ["linear_1"], "r": 1}'
    )
    save_file(LORA, tmp_path / "adapter" / "adapter_model.safetensors")
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "one.png")
    (tmp_path / "prompts").write_text("prompt\na circle\na star\n")
    key = {"study": "s", "question": "Round?", "conditions": ["a"], "items": {"1": {"condition": "a", "file": "one.png"}}}
    (tmp_path / "key").write_text(json.dumps(key))
    (tmp_path / "answers").write_text("study,rater,item,rating\ns,R,1,3\n")
    monkeypatch.chdir(here)
    return {path.name: str(path) for path in tmp_path.iterdir()}


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(command, words, tmp_path, monkeypatch, capsys):
    """Run the command; its one sentence."""
    before = contents(tmp_path)
    module, *job = command.split()
    monkeypatch.setattr(sys, "argv", [module, *job, *words])
    with pytest.raises(SystemExit) as stop:
        run_command(importlib.import_module(f"esd_peft.{module}" + (".__main__" if job else "")).main)
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.err.endswith(errors[0] + "\n"), said
    assert "Traceback" not in said.err and not said.out
    assert contents(tmp_path) == before, "something was written"
    return errors[0]


ROWS = [(command, line, says) for command, table in TABLES.items() for line, says in table]


@pytest.mark.parametrize(("command", "line", "says"), ROWS, ids=lambda x: x[:60])
def test_command_lines(command, line, says, places, tmp_path, monkeypatch, capsys):
    named = {word.partition("=")[0] for word in line.split()}
    usual = [
        word for option, value in USUAL.get(command, {}).items() if line and option not in named for word in (option, value)
    ]
    words = [word.format(**places) for word in [*usual, *line.split()]]
    sentence = refused(command, words, tmp_path, monkeypatch, capsys)
    assert re.search(says, sentence), sentence


def homes(config):
    """All options of a command, and the group that each is in: none for the command's own."""
    groups = groups_of(config)
    own = {name: None for name in config.model_fields if name not in groups}
    return own | {name: group for group, kind in groups.items() for name in kind.model_fields}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tables_leave_no_option_out(command):
    tried = {word.partition("=")[0] for line, _ in TABLES[command] for word in line.split()}
    options = {"--" + name.replace("_", "-") for name in homes(COMMANDS[command])}
    assert options <= tried, options - tried


YAML = [
    (command, name, group)
    for command, config in COMMANDS.items()
    for name, home in homes(config).items()
    for group in dict.fromkeys([None, home])
]


@pytest.mark.parametrize(("command", "name", "group"), YAML)
@pytest.mark.parametrize("value", [{"a": ["map"]}, [[1, None]]], ids=["map", "list"])
def test_every_field_of_the_yaml(command, name, group, value, tmp_path, monkeypatch, capsys):
    """Alone and, where it is in one, in its group."""
    required = {
        "erase": {"concept": "circle"},
        "merge_adapter": {"adapter": "nowhere", "output": "out"},
        "evaluate": {"erased": "nowhere"},
        "study make": {"condition": "nowhere", "question": "Round?"},
        "study analyse": {"answers": "nowhere"},
    }
    values = {key: known for key, known in required[command].items() if key != name}
    values |= {name: value} if group is None else {group: {name: value}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    sentence = refused(command, ["--config", "job.yaml"], tmp_path, monkeypatch, capsys)
    assert f"job.yaml: --{name.replace('_', '-')}" in sentence


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must be a YAML map of options"),
        ("- concept: circle", "must be a YAML map of options"),
        ("concept: circle\nlearning_rat: 0.1", "unknown option learning_rat; did you mean learning_rate"),
        ("concept: circle\n1: 2", "unknown option 1; --print-config lists the options"),
        ("concept: [circle", "is not YAML"),
        ("concept: !!python/object/apply:os.system [echo]", "is not YAML"),
        ("concept: [{name: circle, colour: red}]", "--concept colour is not an option"),
        ("concept: [{erase_from: circle}]", "--concept name is missing"),
        ("concept: [{name: circle, negative_guidance: 101}]", "--concept negative_guidance.*less than or equal to 100"),
        ("concept: [{name: circle, weight: 0}]", "--concept weight.*greater than 0"),
        ("concept: [{name: circle, map_to: ''}]", "--concept map_to"),
        ("concept: circle\nseed: .nan", "--seed"),
        ("concept: circle\nrank: 99999999999999999999", "--rank"),
        ("concept: circle\ntraining: {learning_rat: 0.1}", "unknown option learning_rat; did you mean learning_rate"),
        ("concept: circle\nstudent: {1: 2}", "unknown option 1; --print-config lists the options"),
        ("concept: circle\nstudent: null", "student is a group of options; write them below it"),
        ("concept: circle\nstudent: lora", "student is a group of options; write them below it"),
    ],
)
def test_yaml(text, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "job.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    sentence = refused("erase", ["--config", "job.yaml"], tmp_path, monkeypatch, capsys)
    assert re.search(f"job.yaml.*{says}", sentence), sentence


@pytest.mark.parametrize(
    "line", ["erase --concept circle --per-device-batch-size 0", "merge_adapter --adapter x --output y"]
)
def test_as_processes(line, tmp_path):
    done = commands.run(*line.split(), cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: --") and done.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]
