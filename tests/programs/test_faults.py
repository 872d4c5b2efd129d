"""A few kills, signals and full disks of `faults.py`, which has hundreds."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("faults.py")


def test_kills_are_made_good(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--kills",
        "1",
        "--kills-at-files",
        "60",
        "--signals",
        "2",
        "--output",
        str(tmp_path / "faults.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["kills"]["resumed_bit_identical"] == 1
    assert found["kills_at_files"]["trials"] == found["kills_at_files"]["resumed_bit_identical"] >= 2
    assert found["signals"]["trials"] == found["signals"]["resumed_bit_identical"] == 2
