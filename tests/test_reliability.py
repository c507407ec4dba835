"""Killed at any moment, a run loses no more than the steps since its last checkpoint, and ends where it would have."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from pix2seq import checkpoint
from tests.test_train import TINY, arguments, rows

KILLS = 20


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_no_unusable_state(shapes_root, tmp_path, record_property):
    """Most of the time of such a run is spent in saving, so most kills hit a save."""
    words = ["--max_steps", "60", "--ckpt_every", "1", "--eval_every", "20", "--sample_every", "20"]
    assert train.main(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "train.py", *TINY, *words, "--root", str(shapes_root), "--output_dir", str(output)]
    command += ["--resume", "auto"]
    moments = random.Random(0)
    kills, inside_a_save, highest, unusable = 0, 0, 0, []
    while True:
        log = output / "train.log"
        lines = log.read_text().count("parameters on") if log.exists() else 0
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if kills < KILLS:
            wait_for_steps(run, log, lines)
            time.sleep(moments.uniform(0, 0.4))
            run.kill()
            run.wait()
            kills += 1
            inside_a_save += any((output / "checkpoints").glob(".tmp-*"))
            newest = checkpoint.latest(output / "checkpoints", unusable.append)
            step = int(newest.name.removeprefix("step_")) if newest else 0
            assert step >= highest, "a checkpoint that was there is gone"
            highest = step
        else:
            errors = run.communicate(timeout=300)[1].decode()
            assert run.returncode == 0, errors
            break
    assert highest > 0
    assert inside_a_save > 0
    record_property("kills", kills)
    record_property("inside_a_save", inside_a_save)
    record_property("unusable_states", len(unusable))
    assert not unusable
    assert rows(output) == rows(tmp_path / "whole")
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def wait_for_steps(run: subprocess.Popen, log: Path, lines: int) -> None:
    """Until it has said once more that it begins, or ended."""
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_text().count("parameters on") > lines:
            return
        time.sleep(0.05)
