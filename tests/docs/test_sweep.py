"""docs/sweep.sh knows from a config where its output is, and leaves alone what is done."""

import os
import subprocess
from pathlib import Path

from esd_peft import EraseConfig

SCRIPT = Path(__file__).parents[2] / "docs" / "sweep.sh"


def test_a_finished_job_is_not_run_again(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "one.yaml").write_text(EraseConfig(concept="circle", output="out/one").to_yaml())
    (tmp_path / "sweep" / "list").write_text("sweep/one.yaml\n")
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "result.json").touch()
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(["sh", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "out/one is done\n"), done.stderr
