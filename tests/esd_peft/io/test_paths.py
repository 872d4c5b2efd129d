"""Paths that one may not read, and names that no path can have: a sentence, whoever asks."""

import ast
import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, erase, evaluate, merge_adapter
from esd_peft.errors import UserError
from esd_peft.io import paths
from esd_peft.io.tensors import copy_with_sha256, sha256
from esd_peft.models import open_family
from esd_peft.options import command_line
from runs import SHORTEST as QUICK

PACKAGE = Path(paths.__file__).parents[1]
# what they write is their own, and what the system has against it is said there
WRITERS = {"io/outputs.py", "io/marks.py", "io/jobs.py", "io/locks.py", "training/checkpoint.py"}
TRIED = """
import sys
from pathlib import Path
from esd_peft import EraseConfig, EvaluateConfig, MergeConfig, evaluate, merge_adapter
from esd_peft.errors import UserError
from esd_peft.evaluation.comparison import _read_record
from esd_peft.evaluation.suites import load_suite, read_prompts
from esd_peft.io.tensors import copy_with_sha256, read_tensors, sha256
from esd_peft.models.weight_files import needed_weights
from esd_peft.models import open_family
from esd_peft.models.pipeline_files import copy_pipeline

closed, adapter, model, shapes = map(Path, sys.argv[1:])
trials = [
    lambda: EraseConfig(concept="circle", model=str(closed / "x")),
    lambda: EraseConfig(concept="circle", output=closed),
    lambda: EvaluateConfig(erased=closed / "x"),
    lambda: MergeConfig(adapter=[closed / "x"]),
    lambda: open_family(str(closed / "x")),
    lambda: open_family(str(model)),
    lambda: load_suite(str(closed / "x.yaml")),
    lambda: read_prompts(str(closed / "x.csv"), None),
    lambda: needed_weights(closed, "diffusers"),
    lambda: read_tensors(closed / "x"),
    lambda: sha256(adapter / "adapter_model.safetensors"),
    lambda: copy_with_sha256(adapter / "adapter_model.safetensors", adapter / "copy"),
    lambda: merge_adapter(MergeConfig(adapter=[adapter], base="shapes", output=adapter / "merged")),
    lambda: evaluate(EvaluateConfig(erased=adapter, base="shapes", output=adapter / "evaluation")),
    lambda: _read_record(adapter / "erased.json"),
    lambda: list(copy_pipeline(open_family(str(shapes)), adapter)),
]
for number, trial in enumerate(trials):
    try:
        trial()
    except UserError as error:
        print(number, error)
    except OSError as error:
        sys.exit(f"{number}: {error!r}")
    else:
        sys.exit(f"{number}: it was read")
"""


def without_roots_rights():
    """In the child: files' rights count for root, too, as soon as it is another program."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere root reads everything")
def test_what_one_may_not_read_is_said_in_a_sentence(small_sd, tmp_path):
    closed, adapter, model = tmp_path / "closed", tmp_path / "adapter", tmp_path / "model"
    erase(EraseConfig(concept="circle", output=adapter, **QUICK))
    (adapter / "erased.json").symlink_to(closed / "x")
    shutil.copytree(small_sd, model)
    shapes = shutil.copytree(PACKAGE / "worlds" / "shapes" / "pipeline", tmp_path / "shapes")
    (shapes / "LICENSE").write_text("mine")
    closed.mkdir()
    shut = [closed, adapter / "adapter_model.safetensors", model / "tokenizer", shapes / "LICENSE"]
    for path in shut:
        path.chmod(0)
    try:
        words = [sys.executable, "-c", TRIED, *map(str, (closed, adapter, model, shapes))]
        ran = subprocess.run(words, capture_output=True, text=True, preexec_fn=without_roots_rights, timeout=300)
    finally:
        for path in shut:
            path.chmod(0o700)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = [line for line in ran.stdout.splitlines() if line[:1].isdigit()]
    assert len(said) == TRIED.count("lambda:")
    assert sum("Permission denied" in line for line in said) >= 12, said


def test_paths_are_not_asked_by_pathlib_which_raises():
    """Such as `Path.exists` in a folder that one may not enter: `esd_peft.io.paths` answers instead."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if (name := file.relative_to(PACKAGE).as_posix()) in WRITERS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if asks and node.func.attr in ("exists", "is_file", "is_dir") and not node.args:
                assert (name, node.func.attr) == ("evaluation/suites.py", "is_file"), f"{name}, line {node.lineno}"


def test_files_that_cannot_be_read_or_written_are_told_apart(tmp_path):
    for read in (lambda: sha256(tmp_path), lambda: copy_with_sha256(tmp_path / "no", tmp_path / "copy")):
        with pytest.raises(UserError, match="cannot be read"):
            read()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError):  # the writer says of what option
        copy_with_sha256(tmp_path / "file", tmp_path / "no" / "copy")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, f"owner/{'y' * 300}", "a\nb"])
def test_models_that_a_file_names(tmp_path, name):
    adapter = tmp_path / "adapter"
    erase(EraseConfig(concept="circle", output=adapter, **QUICK))
    file = adapter / "base.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": name}))
    for job in (
        lambda: merge_adapter(MergeConfig(adapter=[adapter], output=tmp_path / "out")),
        lambda: evaluate(EvaluateConfig(erased=adapter, output=tmp_path / "out")),
        lambda: open_family(name, "--base"),
    ):
        with pytest.raises(UserError, match=r"^--base .*(no character of a name|longer than any name)"):
            job()
    assert not (tmp_path / "out").exists()


def test_what_nobody_foresaw_is_a_sentence_with_the_files_name(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command_line.run_command(lambda: (tmp_path / "no").read_text())
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'no'} cannot be used (No such file or directory); see to")
    with pytest.raises(OSError, match="without a name"):
        command_line.run_command(lambda: (_ for _ in ()).throw(OSError("without a name")))
