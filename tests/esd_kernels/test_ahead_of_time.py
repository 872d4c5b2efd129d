"""Every kernel compiles for every architecture, with the launchers' own arguments, into the machine code it is meant to be.

The interpreter, in which the other tests run the kernels on machines without a GPU, accepts what a compiler does not: a
batch of 1, which Triton takes for a constant, for example.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers/ahead_of_time.py"
# The last program adds up what the others stored: the addition that counts a program releases its share, which the same
# thread has stored, and acquires the others'. On AMD the caches are written back before it and emptied after it.
ORDER = {
    "cuda": ["st.global.b32 by the same", "atom.global.gpu.acq_rel.add.u32", "bar.sync"],
    "hip": ["buffer_wbl2 sc1", "s_waitcnt vmcnt(0)", "global_atomic_add", "s_waitcnt vmcnt(0)", "buffer_inv sc1"],
}
KINDS = 2 * 3 * 9  # sizes that 16 divides or not, dtypes, and the scaling or eight combinations of options
# What NVIDIA's architectures make of a launch is alike: they share the kinds of launches among them, and AMD's has every
# fourth. Each compiles all launches of all kinds with `-m slow`.
NVIDIA = ("75", "80", "86", "89", "90", "100", "120")
SHARED = [*(("cuda", arch, first, len(NVIDIA)) for first, arch in enumerate(NVIDIA)), ("hip", "gfx942", 0, 4)]
WHOLE = [pytest.param((*target[:2], 0, 1), marks=pytest.mark.slow) for target in SHARED]


@pytest.mark.parametrize("target", SHARED + WHOLE, ids=lambda target: "-".join(map(str, target)))
def test_compiles_into_wide_loads_without_spills_and_one_ordered_atomic(target, tmp_path):
    backend, arch, first, step = target
    words = [sys.executable, HELPER, backend, arch, str(first), str(step)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == (2 * len(range(first, KINDS, step)) if step > 1 else KINDS // 2 * (6 + 3))  # batches and sizes
    registers = {row["registers"] for row in rows}
    print(f"{backend} {arch}: {min(registers)} to {max(registers)} registers a thread")
    # with more than 64 of them a multiprocessor could not keep its threads full, and the kernel waits for memory
    assert max(registers) <= 64
    for row in rows:
        assert not row["spilled"], row
        assert row["atomics"] == (ORDER[target[0]] if row["kernel"] == "guided_mse" else []), row
        halves = 1 if row["dtype"] != "fp32" else 2  # of a thread's eight elements
        tensors = 1 if row["kernel"] == "scale" else 4 if "anchor" in row["flags"] else 3
        if row["n"] % 16 == 0:
            assert row["wide"] == tensors * halves and row["wide_stores"] == halves, row
        else:  # the rows after the first do not begin at a multiple of 16 bytes
            assert row["wide"] == row["wide_stores"] == 0, row
