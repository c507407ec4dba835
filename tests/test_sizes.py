"""The named sizes are the paper's, and their page shows what was counted."""

import json
from pathlib import Path

import pytest

from benchmarks.models import PAPER, measure, page
from pix2seq.arguments import PRESETS


@pytest.mark.parametrize("size", PRESETS)
def test_the_classic_ones_have_the_papers_parameters(size):
    counted = measure(size, "transformer")
    assert counted["parameters_m"] == pytest.approx(PAPER[size], rel=0.02)
    assert counted["visual_tokens"] == (400 if size == "r50" else 1600)
    capture_cuda_graph = json.loads(Path("docs/results/models.json").read_text())["sizes"]
    assert counted in capture_cuda_graph
    assert measure(size, "llama") in capture_cuda_graph


def test_the_page_is_made_of_the_record():
    rows = json.loads(Path("docs/results/models.json").read_text())["sizes"]
    assert {(row["size"], row["decoder"]) for row in rows} == {
        (s, d) for s in PRESETS for d in ("transformer", "llama")
    }
    assert Path("docs/models.md").read_text() == page(rows)
