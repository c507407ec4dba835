"""Recipes that have to learn, not only run. Minutes each: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pix2seq.data.shapes import draw_dataset

pytestmark = pytest.mark.slow


def train(*words: str) -> None:
    subprocess.run([sys.executable, "train.py", *words], check=True)


def metrics(output: Path) -> dict:
    newest = max((output / "eval").iterdir(), key=lambda path: int(path.name.removeprefix("step_")))
    return json.loads((newest / "metrics.json").read_text())


def test_the_demo_reaches_what_the_readme_promises(tmp_path):
    root = draw_dataset(tmp_path / "shapes")
    train("--config", "configs/demo.yaml", "--root", str(root), "--output_dir", str(tmp_path / "out"))
    reached = metrics(tmp_path / "out")
    assert reached["AP"] >= 0.60
    assert reached["AP50"] >= 0.85
    command = [sys.executable, "evaluate.py", "--checkpoint", str(tmp_path / "out" / "best")]
    subprocess.run([*command, "--root", str(root), "--output_dir", str(tmp_path / "eval")], check=True)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["AP"] >= 0.60


def test_the_overfit_recipe_learns_a_few_pictures_by_heart(tmp_path):
    root = draw_dataset(tmp_path / "shapes", num_train=12, num_val=2, size=256, max_shapes=5)
    train("--config", "configs/overfit.yaml", "--root", str(root), "--output_dir", str(tmp_path / "out"))
    assert metrics(tmp_path / "out")["AP"] >= 0.90
