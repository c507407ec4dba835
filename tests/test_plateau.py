"""The hint at the plateau of x1, on recorded runs."""

import json
from pathlib import Path

import pytest

from pix2seq.training.plateau import METRICS, PlateauHint, is_on_plateau
from tests.runs import run

RUNS = json.loads(Path("docs/results/curves.json").read_text())["runs"]


def recorded_rows(name: str, every: int) -> list[dict]:
    """Rows of a run with --log_every `every`; each is the mean of the recorded ones."""
    curves = [dict(zip(*RUNS[name]["curves"][metric], strict=True)) for metric in METRICS]
    return [
        {"step": step}
        | {
            metric: sum(curve[s] for s in range(step - every + 10, step + 1, 10)) / (every // 10)
            for metric, curve in zip(METRICS, curves, strict=True)
        }
        for step in curves[0]
        if step % every == 0
    ]


def messages(rows: list[dict], num_bins: int) -> list[tuple[int, str]]:
    hint = PlateauHint(num_bins, ["--object_order top_to_bottom"])
    lines = [(row["step"], hint.update(row)) for row in rows]
    return [(step, line) for step, line in lines if line is not None]


@pytest.mark.parametrize("every", [10, 50, 100, 1000])
def test_the_recorded_run_on_blood_cells_is_on_the_plateau(every):
    ((step, line),) = messages(recorded_rows("bccd", every), 128)
    assert 500 < step <= max(800, 2 * every)
    assert line.startswith("hint: ")
    assert "of 128 bins" in line
    assert "--object_order top_to_bottom" in line
    assert "\n" not in line


@pytest.mark.parametrize(("name", "num_bins"), [("demo", 64), ("overfit", 1000)])
@pytest.mark.parametrize("every", [10, 100])
def test_other_recorded_runs_are_not(name, num_bins, every):
    assert messages(recorded_rows(name, every), num_bins) == []


def test_the_recorded_small_recipe_is_not():
    """Its error of x1 falls slowly, by six percent within half of the window, long before it is small."""
    curves = [RUNS["small"]["curves"][metric] for metric in METRICS]
    rows = [
        {"step": step} | {metric: values[index] for metric, (_, values) in zip(METRICS, curves, strict=True)}
        for index, step in enumerate(curves[0][0])
    ]
    assert len(rows) == 85
    assert messages(rows, 320) == []


def test_a_run_whose_error_falls_is_not_on_the_plateau():
    falling = [110, 105, 100, 95, 85, 75, 65, 55, 50, 45, 40]  # bins of 320
    rows = [
        {"step": 50 * number} | dict(zip(METRICS, (12, x1, 8, 8, 0.95), strict=True))
        for number, x1 in enumerate(falling, 1)
    ]
    assert messages(rows, 320) == []


def test_the_end_of_the_plateau_is_logged_once():
    """The blood cells, continued with the errors of the demo in its last steps."""
    rows = recorded_rows("bccd", 50)
    last = recorded_rows("demo", 50)[-20:]
    rows += [row | {"step": 2000 + 50 * number} for number, row in enumerate(last, 1)]
    (_, _), (step, line) = messages([*rows, {"step": 3000, "eval/AP": 0.1}], 128)
    assert 2200 <= step <= 2500
    assert line.startswith("the plateau of x1 has ended")


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([41, 49, 4, 4, 0.9], True),
        ([2, 49, 4, 4, 0.9], True),  # sorted from top to bottom, so that y1 can be predicted
        ([41, 20, 4, 4, 0.9], False),  # x1 is being learnt
        ([41, 49, 44, 45, 0.75], False),  # nothing is learnt yet
        ([41, 49, 4, 4, 0.2], False),  # nor are the classes
        ([2, 3, 0.3, 0.3, 0.97], False),
    ],
)
def test_the_criterion(means, expected):
    assert is_on_plateau(means, 128) == expected


def test_a_resumed_run_does_not_repeat_the_hint(shapes_root, tmp_path, monkeypatch):
    """The steps up to a checkpoint are those of metrics.jsonl."""
    monkeypatch.setattr("pix2seq.training.plateau.WINDOW", 2)
    monkeypatch.setattr("pix2seq.training.plateau.is_on_plateau", lambda means, num_bins: True)
    words = ["--log_every", "1", "--eval_every", "0", "--sample_every", "0", "--lr_scheduler", "constant"]
    assert run(shapes_root, tmp_path, *words, "--max_steps", "4") == 0
    assert run(shapes_root, tmp_path, *words, "--max_steps", "6", "--resume", "auto") == 0
    assert (tmp_path / "train.log").read_text().count("hint: ") == 1
