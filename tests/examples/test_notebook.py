"""examples/erase.ipynb runs from its first cell to its last, and what it draws is what it says."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "examples" / "erase.ipynb", as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_it_installs_as_the_readme_says(notebook):
    (line,) = [line for line in notebook.cells[1].source.splitlines() if line.strip().startswith("!")]
    assert f"{line.strip(' !')} && python -m esd_peft.erase" in (ROOT / "README.md").read_text(encoding="utf-8")


JUDGE = """
import json
import numpy

pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255
print(json.dumps([labels["shape"] for labels in WORLDS["shapes"].load_classifier().classify(pixels)]))
"""


def test_it_runs_and_the_concept_is_gone(notebook, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a reader's machine does not interpret kernels
    notebook.cells.append(nbformat.v4.new_code_cell(JUDGE))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 1
    shapes = json.loads(outputs[-1]["text"])
    assert shapes[:4] == ["circle", "circle", "square", "star"]
    assert "circle" not in shapes[4:] and shapes[6:] == ["square", "star"]
    assert (tmp_path / "merged" / "erased.json").is_file()
