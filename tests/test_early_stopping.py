"""Training ends after some evaluations without a new best AP."""

import signal
from pathlib import Path

import pytest

from pix2seq.training.evaluator import TrainingEvaluator
from tests.runs import TINY, assert_same_run, interrupt_at, read_json, rows, run
from tests.test_multiprocess import launch

WORDS = ("--max_steps", "12", "--eval_every", "1", "--sample_every", "0", "--early_stopping_patience", "3")
BY_STEP = [0.1, 0.3, 0.2, 0.3, 0.4, 0.4, 0.1, 0.2, 0.9, 0.9, 0.9, 0.9]  # the best of step 5, then none up to step 8


@pytest.fixture
def planned_ap(monkeypatch):
    """Evaluations return the AP of BY_STEP."""
    original = TrainingEvaluator.evaluate

    def evaluate(self, model, step, name=""):
        return original(self, model, step, name) | {"AP": BY_STEP[step - 1]}

    monkeypatch.setattr(TrainingEvaluator, "evaluate", evaluate)


def evaluated_steps(output: Path) -> list[int]:
    return [row["step"] for row in rows(output) if "eval/AP" in row]


@pytest.fixture
def stopped(shapes_root, tmp_path, planned_ap) -> Path:
    assert run(shapes_root, tmp_path / "stopped", *WORDS) == 0
    return tmp_path / "stopped"


def test_the_run_finishes(stopped):
    status = read_json(stopped, "status.json")
    reason = "no new best AP in 3 evaluations (--early_stopping_patience 3)"
    assert (status["state"], status["step"], status["reason"]) == ("finished", 8, reason)
    log = (stopped / "train.log").read_text()
    assert f"stopped at step 8 of 12: {reason}" in log
    assert "best AP 0.4000 in best/" in log
    assert log.count("AP by class") == 1  # the table of the last evaluation
    assert (stopped / "final" / "config.json").exists()
    assert evaluated_steps(stopped) == list(range(1, 9))


@pytest.mark.parametrize("step", [6, 7])
def test_a_resumed_run_counts_on(shapes_root, tmp_path, monkeypatch, stopped, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signal.SIGTERM)
        assert run(shapes_root, tmp_path / "out", *WORDS) == 75
    assert run(shapes_root, tmp_path / "out", *WORDS, "--resume", "auto") == 0
    assert_same_run(tmp_path / "out", stopped)


def test_a_stopped_run_continues_with_more_patience_only(shapes_root, stopped):
    assert run(shapes_root, stopped, *WORDS, "--resume", "auto") == 0
    assert read_json(stopped, "status.json")["step"] == 8
    assert run(shapes_root, stopped, *WORDS[:-1], "4", "--resume", "auto") == 0
    status = read_json(stopped, "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("finished", 12, "")
    assert evaluated_steps(stopped) == list(range(1, 13))


def test_an_interrupted_evaluation_is_not_counted_twice(shapes_root, tmp_path, monkeypatch, planned_ap):
    """With a moving average, an evaluation has two parts. After the first one, step 5 has the best AP already."""
    words = [*WORDS, "--ema_decay", "0.5"]
    planned = TrainingEvaluator.evaluate

    def interrupted(self, model, step, name=""):
        if (step, name) == (5, "ema"):
            signal.raise_signal(signal.SIGTERM)
        return planned(self, model, step, name)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingEvaluator, "evaluate", interrupted)
        assert run(shapes_root, tmp_path, *words) == 75
    assert read_json(tmp_path, "status.json")["step"] == 5
    assert run(shapes_root, tmp_path, *words, "--resume", "auto") == 0
    assert read_json(tmp_path, "status.json")["step"] == 8


@pytest.mark.slow
def test_two_processes_stop_together(shapes_root, tmp_path):
    """AP is 0 or the same at each step, because the learning rate is too low."""
    words = ["--root", str(shapes_root), "--output_dir", str(tmp_path), "--batch_size", "2", "--lr", "1e-30"]
    words += ["--max_steps", "30", "--eval_every", "2", "--sample_every", "0", "--early_stopping_patience", "2"]
    done = launch("train.py", *TINY, *words, "--batch_norm", "frozen")
    assert done.returncode == 0, done.stderr
    status = read_json(tmp_path, "status.json")
    assert (status["state"], status["step"]) == ("finished", 6)
    assert status["reason"].startswith("no new best AP in 2 evaluations")
