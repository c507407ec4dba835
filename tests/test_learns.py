"""Recipes reach the AP that the documentation promises. Minutes each: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pix2seq.data.shapes import draw_dataset
from tests.runs import read_json

pytestmark = pytest.mark.slow


def train(*words: str) -> None:
    subprocess.run([sys.executable, "train.py", *words], check=True)


def last_metrics(output: Path) -> dict:
    newest = max((output / "eval").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    return json.loads((newest / "metrics.json").read_text())


def test_the_demo_recipe(tmp_path):
    root = draw_dataset(tmp_path / "shapes")
    train("--config", "configs/demo.yaml", "--root", str(root), "--output_dir", str(tmp_path / "out"))
    metrics = last_metrics(tmp_path / "out")
    assert metrics["AP"] >= 0.80
    assert metrics["AP50"] >= 0.95
    command = [sys.executable, "evaluate.py", "--checkpoint", str(tmp_path / "out" / "best")]
    subprocess.run([*command, "--root", str(root), "--output_dir", str(tmp_path / "eval")], check=True)
    assert read_json(tmp_path, "eval/metrics.json")["AP"] >= 0.80


def test_the_overfit_recipe(tmp_path):
    root = draw_dataset(tmp_path / "shapes", num_train=12, num_val=2, size=256, max_shapes=5)
    train("--config", "configs/overfit.yaml", "--root", str(root), "--output_dir", str(tmp_path / "out"))
    assert last_metrics(tmp_path / "out")["AP"] >= 0.90
