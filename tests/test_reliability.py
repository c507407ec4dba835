"""Killed at any moment, a run loses no more than the steps since its last checkpoint, and ends where it would have."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pix2seq import train
from pix2seq.training import checkpoint
from tests.runs import TINY, arguments, rows

KILLS = 20


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_no_unusable_state(shapes_root, tmp_path, record_property):
    """Every other kill waits for a save to begin."""
    words = ["--max_steps", "400", "--ckpt_every", "1", "--eval_every", "100", "--sample_every", "100"]
    assert train.run_training(arguments(shapes_root, tmp_path / "whole", *words)) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "train.py", *TINY, *words, "--root", str(shapes_root), "--output_dir", str(output)]
    command += ["--resume", "auto"]
    log, moments = output / "train.log", random.Random(0)
    inside_a_save, highest, unusable = 0, 0, []
    for kill in range(KILLS):
        lines, left_behind = begun(log), half_saves(output)
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda lines=lines: begun(log) > lines)
        time.sleep(moments.uniform(0, 0.4))
        if kill % 2:
            wait_until(lambda left_behind=left_behind: half_saves(output) - left_behind)
            time.sleep(moments.uniform(0, 0.005))
        run.kill()
        assert run.wait() == -signal.SIGKILL, "it had ended by itself"
        inside_a_save += bool(half_saves(output) - left_behind)
        newest = checkpoint.latest(output / "checkpoints", unusable.append)
        step = int(newest.name.removeprefix("step_")) if newest else 0
        assert step >= highest, "a checkpoint that was there is gone"
        highest = step
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert highest > 0
    assert inside_a_save > 0
    record_property("kills", KILLS)
    record_property("inside_a_save", inside_a_save)
    record_property("unusable_states", len(unusable))
    assert not unusable
    assert rows(output) == rows(tmp_path / "whole")
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def begun(log: Path) -> int:
    """How often the run has said that it begins."""
    return log.read_text().count("parameters on") if log.exists() else 0


def half_saves(output: Path) -> set[int]:
    """Folders of saves that are not complete, or were never finished."""
    found = set()
    for folder in (output / "checkpoints").glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            found.add(folder.stat().st_ctime_ns)
    return found


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
