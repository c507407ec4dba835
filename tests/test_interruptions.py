"""Signals: a run that is told to stop saves first, whatever it is doing."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pix2seq import train
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.training import checkpoint, evaluator
from tests.runs import TINY, arguments, interrupt_at, rows


def test_a_signal_to_the_whole_process_group_is_survived_by_the_workers(shapes_root, tmp_path):
    """As schedulers and shells send it. A data worker that dies of it would end the run before it has saved."""
    output = tmp_path / "out"
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(output), "--num_workers", "2"]
    words += ["--max_steps", "100000", "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    run = subprocess.Popen([sys.executable, "train.py", *words], start_new_session=True, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGTERM)
        errors = run.communicate(timeout=120)[1].decode()
    finally:
        run.kill()
    assert run.returncode == 75, errors
    step = json.loads((output / "status.json").read_text())["step"]
    assert checkpoint.latest(output / "checkpoints").name == f"step_{step:08d}"


@pytest.mark.parametrize("when", ["evaluation", "last evaluation", "picture"])
def test_a_run_told_to_stop_while_it_evaluates_saves_and_makes_up_for_it(
    finished, shapes_root, tmp_path, monkeypatch, when
):
    output = tmp_path / "out"
    step, batches = {"evaluation": (3, 2), "last evaluation": (6, 2), "picture": (4, 1)}[when]
    original = evaluator.predict
    words = ("--eval_batch_size", "1") if when == "picture" else ()

    def interrupted(detector, dataset, *rest, stop, warn):
        asked = []

        def asks():
            asked.append(0)
            done = (len(list((output / "eval").glob("*"))), len(list((output / "samples").glob("predictions*"))))
            if done == {3: (0, 0), 4: (1, 0), 6: (1, 1)}[step] and len(asked) == batches:
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        return original(detector, dataset, *rest, stop=asks, warn=warn)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "predict", interrupted)
        assert train.run_training(arguments(shapes_root, output, *words)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step)
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto", *words)) == 0
    assert rows(output) == rows(finished)
    assert (output / "samples" / "predictions_00000004.png").is_file()


def test_a_run_told_to_stop_while_it_decodes_does_not_finish_the_batch(finished, shapes_root, tmp_path, monkeypatch):
    original, positions = Pix2SeqForObjectDetection.step, []

    def step(self, ids, position, cache, rows):
        positions.append(position)
        if position == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, ids, position, cache, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "step", step)
        assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 75
    assert positions == list(range(13)), "of 30: it stops before the next token"
    assert json.loads((tmp_path / "out" / "status.json").read_text())["step"] == 3
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--resume", "auto")) == 0
    assert rows(tmp_path / "out") == rows(finished)


def test_a_run_told_to_stop_while_it_saves_finishes_the_save(finished, shapes_root, tmp_path, monkeypatch):
    output = tmp_path / "out"
    original = checkpoint.commit

    def commit(final, write, *rest):
        def told_to_stop(folder):
            write(folder)
            if final.name == "step_00000003":
                os.kill(os.getpid(), signal.SIGUSR1)

        original(final, told_to_stop, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "commit", commit)
        assert train.run_training(arguments(shapes_root, output)) == 75
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGUSR1")
    folders = list((output / "checkpoints").iterdir())
    assert "step_00000003" in {folder.name for folder in folders}
    assert all(checkpoint.verify(folder) is None for folder in folders)
    assert train.run_training(arguments(shapes_root, output, "--resume", "auto")) == 0
    assert rows(output) == rows(finished)


def test_a_run_that_cannot_save_when_told_to_stop_says_so(shapes_root, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    monkeypatch.setattr(torch, "save", fails)
    assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 1
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_accelerate_launch_with_one_process_passes_sigterm_on(shapes_root, tmp_path, record_property):
    """It dies of it without a word to its child; the kernel tells the child."""
    output = tmp_path / "out"
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(output)]
    words += ["--max_steps", "100000", "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", *words]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        told = time.monotonic()
        launcher.terminate()
        launcher.wait(timeout=60)
        while json.loads((output / "status.json").read_text())["state"] == "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        seconds = time.monotonic() - told
        record_property("seconds_from_signal_to_end", seconds)
        assert seconds < 20
    finally:
        launcher.kill()
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("preempted", "SIGTERM")
    assert checkpoint.latest(output / "checkpoints").name == f"step_{status['step']:08d}"


def test_ctrl_c_saves_and_leaves_with_130(shapes_root, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    assert train.run_training(arguments(shapes_root, tmp_path / "out")) == 130
    assert checkpoint.latest(tmp_path / "out" / "checkpoints").name == "step_00000002"


def test_an_evaluation_broken_off_between_two_detectors_is_written_once(shapes_root, tmp_path, monkeypatch):
    output, words = tmp_path / "out", ("--ema_decay", "0.5", "--max_steps", "2", "--eval_every", "2")
    original = evaluator.predict

    def interrupted(*args, stop, warn):
        if (output / "eval" / "step_2").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, stop=stop, warn=warn)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "predict", interrupted)
        assert train.run_training(arguments(shapes_root, output, *words)) == 75
    assert [key for row in rows(output) for key in row if key.endswith("/AP")] == ["eval/AP"]
    assert train.run_training(arguments(shapes_root, output, *words, "--resume", "auto")) == 0
    assert [key for row in rows(output) for key in row if key.endswith("/AP")] == ["eval/AP", "eval/ema/AP"]
    assert sum("train/loss" in row for row in rows(output)) == 1
