"""Kill and interrupt the commands, fill the disk: nothing is lost, and every message is one sentence.

    python tests/programs/faults.py --kills 110 --kills-at-files 1 --signals 60 --full-disk 18 \\
        --output benchmarks/results/faults.json

Kills are SIGKILLs at moments drawn evenly over the length of an uninterrupted erase and merge, or at each file that these
open, make, rename or remove; signals are SIGINT, SIGTERM and SIGHUP at such moments. After each, the command runs again
(with --resume where there is a checkpoint, otherwise with --overwrite) until it is done; then all files of the adapter and
of the merged model must be those of the uninterrupted run, bit for bit, but for seconds and memory. The imports are shared:
every run is a fork of this process. `--full-disk` needs to be allowed to mount a tmpfs: where one is not root, `unshare -rm`
before the command allows it on most Linux systems.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked
import torch
import yaml
from safetensors.torch import load_file

from esd_peft import erase, merge_adapter  # noqa: F401 (imported once, before the forks)
from esd_peft.io.marks import MARK
from esd_peft.options import command_line
from esd_peft.runtime import profiling
from esd_peft.training import checkpoint

torch.set_num_threads(1)
checkpoint.SECONDS = 0.0  # one after each step
QUICK = [
    *(
        "--concept",
        "circle",
        "--device",
        "cpu",
        "--num-validation-images",
        "0",
        "--num-inference-steps",
        "5",
        "--trajectories",
        "2",
    ),
    *("--rollout", "student", "--buffer-refresh-interval", "4", "--max-train-steps", "8", "--train-batch-size", "4"),
]
TAKEN = ("seconds", "peak_memory_bytes")  # in result.json
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
HALF = (".draft-", ".old-")  # what is being written, or replaced
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Runs:
    """Erase and merge in `folder`, as forks of this process."""

    def __init__(self, folder: Path, options: list[str] | None = None) -> None:
        self.folder = folder
        (folder / "said").touch()
        self.options = QUICK if options is None else options
        self.note = mmap.mmap(-1, 64)  # what the child is at: the phase's name, then file events so far

    def arguments(self, command: str) -> list[str]:
        """The command line with which a user would start it, or go on."""
        if command == "merge":
            return ["--adapter", "erased", "--output", "merged", "--no-verify", "--overwrite"]
        again = "--resume" if [*self.folder.glob("erased.checkpoint/step-*")] else "--overwrite"
        return [*self.options, "--output", "erased", again]

    def start(self, command: str, before: Callable[[], None] = lambda: None) -> int:
        """Fork; returns the process id."""
        arguments = self.arguments(command)
        self.note[:] = bytes(64)
        if pid := os.fork():
            return pid
        code = 1
        try:
            with (self.folder / "said").open("a") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            os.chdir(self.folder)
            sys.argv = [command, *arguments]
            self._watch(command)
            before()
            main = sys.modules[f"esd_peft.{'erase' if command == 'erase' else 'merge_adapter'}"].main
            command_line.run_command(main)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _watch(self, command: str) -> None:
        switch = profiling.PhaseProfiler._switch

        def noted(profiler: profiling.PhaseProfiler, name: str | None) -> None:
            self.note[:16] = (name or "between").encode().ljust(16)
            switch(profiler, name)

        profiling.PhaseProfiler._switch = noted  # type: ignore[method-assign]
        self.note[:16] = {"erase": b"start", "merge": b"merge"}[command].ljust(16)

    @property
    def phase(self) -> str:
        """Where the child is, or was when it ended."""
        return bytes(self.note[:16]).rstrip(b"\0 ").decode()

    def die_at(self, event: int) -> Callable[[], None]:
        """For `start`: SIGKILL at the n-th file below the folder that is opened for writing, made, renamed or removed."""

        def install() -> None:
            seen = 0

            def hook(name: str, values: tuple) -> None:
                nonlocal seen
                if name not in EVENTS or not isinstance(values[0], str | Path):
                    return
                if not os.path.abspath(values[0]).startswith(f"{self.folder}/"):
                    return
                if name == "open" and not values[2] & (os.O_WRONLY | os.O_RDWR):
                    return
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1
                self.note[16:20] = seen.to_bytes(4, "little")

            sys.addaudithook(hook)

        return install

    @property
    def events(self) -> int:
        """How many there were."""
        return int.from_bytes(self.note[16:20], "little")

    def finish(self) -> None:
        """Run again what is not done. Raises if it does not end well."""
        erased = (self.folder / "erased" / "result.json").is_file() and not (self.folder / "erased.checkpoint").exists()
        for command in ["merge"] if erased else ["erase", "merge"]:
            if ended := self.wait(self.start(command)):
                raise AssertionError(f"{command} ended with {ended}: {self.said()}")

    @staticmethod
    def wait(pid: int) -> int:
        """The exit code, or minus the signal's number."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def said(self) -> str:
        """All that was printed so far, without the bars."""
        text = (self.folder / "said").read_text(encoding="utf-8", errors="replace")
        return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))

    def bits(self) -> dict[str, str]:
        """The hashes of all that was made, but for the seconds and the memory that it took."""
        found = {}
        for path in sorted([*self.folder.glob("erased/**/*"), *self.folder.glob("merged/**/*")]):
            if path.is_file() and path.name != MARK:
                content = path.read_bytes()
                if path.name == "result.json":
                    result = json.loads(content)
                    content = json.dumps({k: v for k, v in result.items() if k not in TAKEN}).encode()
                found[f"{path.relative_to(self.folder)}"] = hashlib.sha256(content).hexdigest()
        return found


def check_whole(folder: Path) -> None:
    """Every file that has its name can be read from beginning to end."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(mark in part for part in path.relative_to(folder).parts for mark in HALF):
            continue
        if path.parent.name == "erased.checkpoint" and path.suffix == ".safetensors":
            assert checkpoint._read(path)[1] is not None, f"{path} is half-written"
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in (".json", ".yaml"):
            yaml.safe_load(path.read_text(encoding="utf-8"))


def check_clean(folder: Path) -> None:
    """Nothing is left but what was asked for."""
    there = sorted(path.name for path in folder.iterdir())
    hidden = [path for path in folder.rglob(".*") if any(mark in path.name for mark in HALF)]
    assert there == ["erased", "merged", "said"] and not hidden, f"left behind: {there} {hidden}"


class Uninterrupted:
    """How long the commands take, and what they make."""

    def __init__(self, folder: Path) -> None:
        runs = Runs(folder)
        self.seconds, self.events = {}, {}
        for command in ("erase", "merge"):
            since = time.monotonic()
            assert runs.wait(runs.start(command, runs.die_at(-1))) == 0, runs.said()
            self.seconds[command] = time.monotonic() - since
            self.events[command] = runs.events
        check_clean(folder)
        self.bits = runs.bits()
        assert len(self.bits) >= 3

    def differs(self, runs: Runs) -> list[str]:
        """The files of `runs` that are others, are missing or should not be there."""
        found = runs.bits()
        return [name for name in sorted({*found, *self.bits}) if found.get(name) != self.bits.get(name)]


def kill_and_resume(whole: Uninterrupted, folder: Path, kill: Callable[[Runs], str]) -> str:
    """One trial in an empty `folder`; returns the phase in which the kill struck."""
    runs = Runs(folder)
    phase = kill(runs)
    check_whole(folder)
    runs.finish()
    check_whole(folder)
    check_clean(folder)
    assert not (other := whole.differs(runs)), f"other bits after {phase}: {other}"
    return phase


def at_moment(whole: Uninterrupted, moment: float) -> Callable[[Runs], str]:
    """Kill so many seconds after the start of erase, or of the merge that follows."""

    def kill(runs: Runs) -> str:
        left = moment
        for command in ("erase", "merge"):
            if left > whole.seconds[command] and command == "erase":
                assert runs.wait(runs.start(command)) == 0, runs.said()
                left -= whole.seconds[command]
                continue
            pid = runs.start(command)
            time.sleep(left)
            os.kill(pid, signal.SIGKILL)
            return runs.phase if runs.wait(pid) == -signal.SIGKILL else "after the end"
        raise AssertionError

    return kill


def interrupted(whole: Uninterrupted, moment: float, number: int) -> Callable[[Runs], str]:
    """The signal so many seconds after the start of erase, or of the merge that follows: exit code 130 and one sentence."""

    def interrupt(runs: Runs) -> str:
        command, wait = "erase", moment
        if wait > whole.seconds["erase"]:
            assert runs.wait(runs.start("erase")) == 0, runs.said()
            command, wait = "merge", wait - whole.seconds["erase"]
        before = len(runs.said())
        pid = runs.start(command)
        time.sleep(max(wait, 0.1))  # the handlers are there
        phase = runs.phase
        os.kill(pid, number)
        code = runs.wait(pid)
        said = runs.said()[before:]
        assert "Traceback" not in said and code in (0, 130), f"{code}: {said}"
        assert code == 0 or said.strip().splitlines()[-1].startswith("interrupted"), said
        return phase if code else "after the end"

    return interrupt


def at_event(command: str, event: int) -> Callable[[Runs], str]:
    """Kill where the command is about to touch the n-th file."""

    def kill(runs: Runs) -> str:
        if command == "merge":
            assert runs.wait(runs.start("erase")) == 0, runs.said()
        assert runs.wait(runs.start(command, runs.die_at(event))) == -signal.SIGKILL, runs.said()
        return runs.phase

    return kill


def kills_at_moments(count: int, seed: int = 0) -> dict:
    """`count` kills at random moments of erase and merge."""
    draws = random.Random(seed)
    return _kills(lambda whole: [at_moment(whole, draws.uniform(0, sum(whole.seconds.values()))) for _ in range(count)])


def kills_at_files(every: int) -> dict:
    """A kill at each file, or each so many, that erase and merge touch."""
    return _kills(
        lambda whole: [at_event(name, n) for name, events in whole.events.items() for n in range(0, events, every)]
    )


def signals(count: int, seed: int = 0) -> dict:
    """`count` signals, of each kind in turn, at random moments of erase and merge."""
    draws = random.Random(seed)

    def plan(whole: Uninterrupted) -> list[Callable[[Runs], str]]:
        moments = [draws.uniform(0, sum(whole.seconds.values())) for _ in range(count)]
        return [interrupted(whole, moment, SIGNALS[n % len(SIGNALS)]) for n, moment in enumerate(moments)]

    return _kills(plan)


def _kills(plan: Callable[[Uninterrupted], list[Callable[[Runs], str]]]) -> dict:
    """Raises `AssertionError` at the first that is not made good."""
    struck: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = Uninterrupted(_made(Path(folder) / "whole"))
        trials = plan(whole)
        for number, kill in enumerate(trials):
            trial = _made(Path(folder) / f"{number}")
            struck[kill_and_resume(whole, trial, kill)] += 1
            shutil.rmtree(trial)
            print(f"trial {number + 1} of {len(trials)}", flush=True)
    seconds = {command: round(value, 2) for command, value in whole.seconds.items()}
    return {
        "trials": len(trials),
        "resumed_bit_identical": len(trials),
        "struck_in": struck,
        "uninterrupted_seconds": seconds,
    }


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A disk of that many bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(_made(folder))], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disks(count: int) -> dict:
    """Disks from too small for a checkpoint to nearly large enough: exit code 2, one sentence, nothing half-written.

    Then the disk grows, and the run goes on to the same bits.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = _made(Path(folder) / "whole")
        whole = Uninterrupted(made)
        most = 2 * sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        said: Counter[str] = Counter()
        for number in range(count):
            size = 64 * 2**10 + (most - 64 * 2**10) * number // count
            with tmpfs(Path(folder) / f"disk-{number}", size) as disk:
                said[_fill(Runs(disk), whole)] += 1
                print(f"disk {number + 1} of {count}", flush=True)
        return {"disks": count, "outcomes": dict(said)}


def _fill(runs: Runs, whole: Uninterrupted) -> str:
    outcome = "large enough"
    for command in ("erase", "merge"):
        code = runs.wait(runs.start(command))
        check_whole(runs.folder)
        if code:
            last = runs.said().strip().splitlines()[-1]
            assert code == 2 and last.startswith("error: --output"), f"{code}: {runs.said()}"
            outcome = f"{command}: refused, then finished with the same bits"
            break
    subprocess.run(["mount", "-o", "remount,size=256m", str(runs.folder)], check=True)
    runs.finish()
    check_clean(runs.folder)
    assert not (other := whole.differs(runs)), other
    return outcome


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="at random moments")
    parser.add_argument("--kills-at-files", type=int, default=0, metavar="N", help="at every N-th file that is touched")
    parser.add_argument("--signals", type=int, default=0, help="at random moments")
    parser.add_argument("--full-disk", type=int, default=0, metavar="N", help="disks of N sizes")
    parser.add_argument("--output", type=Path, help="a JSON file; what it holds of other kinds of faults stays")
    given = parser.parse_args()
    results = json.loads(given.output.read_text()) if given.output and given.output.is_file() else {}
    command = "python " + shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
    jobs = {
        "kills": (kills_at_moments, given.kills),
        "kills_at_files": (kills_at_files, given.kills_at_files),
        "signals": (signals, given.signals),
        "full_disk": (full_disks, given.full_disk),
    }
    for name, (job, count) in jobs.items():
        if count:
            since = time.monotonic()
            results[name] = {"command": command, **job(count), "seconds": round(time.monotonic() - since)}
            print(json.dumps(results[name], indent=2))
            if given.output:
                given.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
