"""docs/tour.ipynb runs as it stands, and holds nothing but what was written."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path("docs/tour.ipynb")
NOTEBOOK = nbformat.read(TOUR, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def test_outputs_are_stripped():
    nbformat.validate(NOTEBOOK)
    assert len(CODE) >= 8
    for cell in CODE:
        assert not cell.outputs
        assert cell.execution_count is None
    assert "widgets" not in NOTEBOOK.metadata


def test_links_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", "".join(cell.source for cell in NOTEBOOK.cells))
    assert targets
    assert all((TOUR.parent / target).exists() for target in targets)


def test_it_begins():
    """All it imports is there, and so is what it shows before the detector learns."""
    scope = {}
    for cell in CODE[:6]:
        exec(cell.source, scope)
    assert scope["back"].shape == scope["canvas"].boxes.shape == (3, 4)


@pytest.mark.slow
def test_it_runs(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # Jupyter starts it in its own folder, and that is all
    played = nbformat.read(TOUR, as_version=4)
    NotebookClient(played, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    pictures = [
        output for cell in played.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 6
