"""The properties of tests/esd_peft/test_fuzz.py on ten thousand examples each.

    python tests/programs/fuzz.py --output benchmarks/results/faults.json

`--only suite,csv` runs those readers; what the file holds of others, and of other kinds of faults, stays.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = re.compile(r"(\d+) passing, (\d+) failing")


class Counts:
    """A pytest plugin: what hypothesis tells of each test."""

    def __init__(self) -> None:
        self.readers: dict[str, dict[str, float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if call.when == "call":
            said = COUNTS.findall(getattr(item, "hypothesis_statistics", ""))
            self.readers[item.name.removeprefix("test_")] = {
                "examples": sum(int(passed) + int(failed) for passed, failed in said),
                "failures": sum(int(failed) for _, failed in said) or int(report.failed),
                "seconds": round(call.duration),
            }
        return report


def main() -> int:
    """The command line; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="large", help="of hypothesis, in tests/conftest.py")
    parser.add_argument("--only", metavar="A,B", default="", help="parts of these readers' names; left out: all")
    parser.add_argument("--output", type=Path, help="a JSON file")
    given = parser.parse_args()
    counts = Counts()
    words = [f"{ROOT / 'tests/esd_peft/test_fuzz.py'}", "-q", "-p", "no:logging", "-p", "no:cacheprovider", "-W", "ignore"]
    words += [f"--rootdir={ROOT}", f"--hypothesis-profile={given.profile}", "-k", " or ".join(given.only.split(","))]
    code = pytest.main(words, [counts])
    print(json.dumps(counts.readers, indent=2))
    if given.output:
        results = json.loads(given.output.read_text()) if given.output.is_file() else {}
        command = "python " + shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
        found = {name: {"command": command, **count} for name, count in counts.readers.items()}
        results["fuzz"] = results.get("fuzz", {}) | found
        given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
