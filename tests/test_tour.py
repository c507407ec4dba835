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
    for cell in CODE:
        assert not cell.outputs
        assert cell.execution_count is None
    assert "widgets" not in NOTEBOOK.metadata


def test_links_exist():
    links = re.findall(r"\]\(([^)#]+)\)", "".join(cell.source for cell in NOTEBOOK.cells))
    assert links
    assert all((TOUR.parent / link).exists() for link in links)


def test_the_cells_before_training_run():
    scope = {}
    for cell in CODE[:6]:
        exec(cell.source, scope)
    assert scope["decoded_boxes"].shape == scope["padded"].boxes.shape == (3, 4)


@pytest.mark.slow
def test_all_cells_run(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # Jupyter does not set it
    executed = nbformat.read(TOUR, as_version=4)
    NotebookClient(executed, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
