"""Every notebook runs from top to bottom, and finds what its text says that it finds."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What each notebook computed: expressions that must be true after its last cell.
FOUND = {
    "manual_against_automatic.ipynb": [
        "report.agrees and len(report.rows) == 4",
        "max(jax.tree.leaves(differences)) < 1e-6",
        "[row.path for row in flipped.rows if not row.agrees] == ['hidden/b']",
        "[round(row.cosine, 4) for row in flipped.rows if not row.agrees] == [-1]",
        "{row.path for row in forgot.rows if not row.agrees} == {'hidden/w', 'hidden/b'}",
        "[leaf.path for leaf in audit.leaves if not leaf.agrees] == ['w']",
        "'data:image/png' in audit._repr_html_()",
        "loss_value < 0.5",
        "norms.shape == train['targets'].shape",
        "0.5 < share < 1",
    ],
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a notebook in a fresh kernel of this Python, and give what it printed."""
    # Kernels and settings of the user, which may belong to another Python, are not looked at.
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("JUPYTER_PATH", raising=False)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")

    def run(notebook):
        client = NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        )
        client.execute()
        return [
            output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
        ]

    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_finds_what_it_says(path, run):
    notebook = nbformat.read(path, as_version=4)
    figures = sum("plt.show()" in cell.source for cell in notebook.cells)
    expressions = FOUND[path.name]
    checks = "\n".join(f"{text!r}: bool({text})," for text in expressions)
    last = nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({{{checks}}}))")
    notebook.cells.append(last)
    found = json.loads(run(notebook)[-1])
    assert found == dict.fromkeys(expressions, True)
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", ()) for output in drawn) == figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_there_is_something_to_find_in_every_notebook():
    assert {path.name for path in NOTEBOOKS} == set(FOUND)
