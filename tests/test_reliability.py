"""kill -9 at random moments."""

import contextlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pix2seq.training import checkpoint
from tests.runs import TINY, assert_same_run, run

KILLS = 20


@pytest.mark.slow
def test_kill_9_loses_no_checkpoint_and_changes_no_result(shapes_root, tmp_path, record_property):
    """Every other kill waits until a checkpoint is being written."""
    words = ["--max_steps", "400", "--ckpt_every", "1", "--eval_every", "100", "--sample_every", "100"]
    assert run(shapes_root, tmp_path / "whole", *words) == 0
    output = tmp_path / "killed"
    command = [sys.executable, "train.py", *TINY, *words, "--root", str(shapes_root), "--output_dir", str(output)]
    command += ["--resume", "auto"]
    log, rng = output / "train.log", random.Random(0)
    kills_inside_a_save, latest_step, warnings = 0, 0, []
    for kill in range(KILLS):
        starts, leftovers = count_starts(log), incomplete_saves(output)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda starts=starts: count_starts(log) > starts)
        time.sleep(rng.uniform(0, 0.4))
        if kill % 2:
            wait_until(lambda leftovers=leftovers: incomplete_saves(output) - leftovers)
            time.sleep(rng.uniform(0, 0.005))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run ended before the kill"
        kills_inside_a_save += bool(incomplete_saves(output) - leftovers)
        newest = checkpoint.latest_checkpoint(output / "checkpoints", warnings.append)
        step = int(newest.name.removeprefix("step_")) if newest else 0
        assert step >= latest_step, "a checkpoint was lost"
        latest_step = step
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert latest_step > 0
    assert kills_inside_a_save > 0
    record_property("kills", KILLS)
    record_property("inside_a_save", kills_inside_a_save)
    record_property("unusable_states", len(warnings))
    assert not warnings
    assert_same_run(output, tmp_path / "whole")


def count_starts(log: Path) -> int:
    return log.read_text().count("parameters on") if log.exists() else 0


def incomplete_saves(output: Path) -> set[int]:
    """Temporary folders of saves, identified by their time of creation."""
    times = set()
    for folder in (output / "checkpoints").glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            times.add(folder.stat().st_ctime_ns)
    return times


def wait_until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
