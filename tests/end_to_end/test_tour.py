"""The notebook in examples/ runs as it stands, and holds no outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(TOUR, as_version=4)


def test_it_holds_no_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None or cell.metadata]


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, startup_timeout=300, resources=place).execute()
    outputs = [item for cell in notebook.cells if cell.cell_type == "code" for item in cell.outputs]
    pages = [item.data["text/html"] for item in outputs if "text/html" in item.get("data", {})]
    for title in ("<b>catalog ", "<b>clustering main</b>", "<b>plan epochs</b>"):
        assert [page for page in pages if title in page]
    kinds = {kind for item in outputs for kind in item.get("data", {})}
    assert {"image/svg+xml", "image/png"} <= kinds
    printed = "".join(item.text for item in outputs if item.output_type == "stream" and item.name == "stdout")
    assert printed.count(" times an epoch\n") == 5
    assert "background" in printed.splitlines()[-1]  # a caption
