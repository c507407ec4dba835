import json
from pathlib import Path

import pytest

from benchmarks.models import PAPER, measure, page
from pix2seq.arguments import PRESETS

RECORD = json.loads(Path("docs/results/models.json").read_text())["presets"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_the_paper(preset):
    measured = measure(preset, "transformer")
    assert measured["parameters_m"] == pytest.approx(PAPER[preset], rel=0.02)
    assert measured["visual_tokens"] == (400 if preset == "r50" else 1600)
    assert measured in RECORD
    assert measure(preset, "llama") in RECORD


def test_the_page_is_up_to_date():
    assert {(row["preset"], row["decoder"]) for row in RECORD} == {
        (preset, decoder) for preset in PRESETS for decoder in ("transformer", "llama")
    }
    assert Path("docs/models.md").read_text() == page(RECORD)
