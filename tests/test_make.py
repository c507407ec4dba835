"""The targets of the Makefile that need no installation."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments

ROOT = Path(__file__).parent.parent
TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1].split()

pytestmark = pytest.mark.skipif(os.name == "nt" or not shutil.which("make"), reason="needs make")


def make(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_target():
    assert [line.split()[0] for line in make("help").splitlines()] == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_targets_expand(target):
    assert make("--dry-run", target, "exp=name")


def test_new_experiment_has_a_valid_recipe(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "experiments" / "template", tmp_path / "experiments" / "template")
    make("new-exp", "exp=larger-image", cwd=tmp_path)
    recipe = tmp_path / "experiments" / "larger-image" / "recipe.yaml"
    args = parse(TrainArguments, ["--config", str(recipe), "--root", "/data"])
    assert args.output_dir == "runs/larger-image"
