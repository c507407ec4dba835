"""Signals: a run that receives one saves a checkpoint before it stops, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from pix2seq import manifest, train
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.training import checkpoint, evaluator
from tests.runs import NO_EVALUATION, TINY, assert_same_run, interrupt_at, read_json, rows, run

ENDLESS = [*TINY, *NO_EVALUATION, "--max_steps", "100000", "--ckpt_every", "0"]


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_saved(output, state: str = "preempted") -> None:
    """Asserts that the newest checkpoint is that of the step in status.json."""
    status = read_json(output, "status.json")
    assert status["state"] == state
    assert checkpoint.latest_checkpoint(output / "checkpoints").name == f"step_{status['step']:08d}"


def test_data_workers_survive_a_signal_to_the_process_group(shapes_root, tmp_path):
    """Schedulers and shells signal the whole group. Without its workers, a run could not finish its step."""
    words = [*ENDLESS, "--root", str(shapes_root), "--output_dir", str(tmp_path), "--num_workers", "2"]
    process = subprocess.Popen([sys.executable, "train.py", *words], start_new_session=True, stderr=subprocess.PIPE)
    try:
        wait_until((tmp_path / "metrics.jsonl").exists)
        os.killpg(process.pid, signal.SIGTERM)
        errors = process.communicate(timeout=120)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert_saved(tmp_path)


@pytest.mark.slow
def test_accelerate_launch_with_one_process(shapes_root, tmp_path, record_property):
    """The launcher dies of SIGTERM without forwarding it; the kernel signals the child."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py", *ENDLESS]
    command += ["--root", str(shapes_root), "--output_dir", str(tmp_path)]
    launcher = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "metrics.jsonl").exists)
        signalled = time.monotonic()
        launcher.terminate()
        launcher.wait(timeout=60)
        wait_until(lambda: read_json(tmp_path, "status.json")["state"] != "running", seconds=20)
        record_property("seconds_from_signal_to_end", time.monotonic() - signalled)
    finally:
        launcher.kill()
    assert_saved(tmp_path)
    assert read_json(tmp_path, "status.json")["reason"] == "SIGTERM"


@pytest.mark.parametrize("during", ["evaluation", "last evaluation", "sample"])
def test_a_signal_during_evaluation(finished, shapes_root, tmp_path, monkeypatch, during):
    """The run saves, and the resumed run repeats the evaluation."""
    step, batch, finished_evaluations, finished_samples = {
        "evaluation": (3, 2, 0, 0),
        "last evaluation": (6, 2, 1, 1),
        "sample": (4, 1, 1, 0),
    }[during]
    words = ("--eval_batch_size", "1") if during == "sample" else ()
    original = evaluator.predict

    def interrupted(*args, stop, **kwargs):
        calls = []

        def stop_after_signal():
            calls.append(0)
            evaluations, samples = (tmp_path / "eval").glob("*"), (tmp_path / "samples").glob("predictions*")
            done = (len(list(evaluations)), len(list(samples)))
            if done == (finished_evaluations, finished_samples) and len(calls) == batch:
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        return original(*args, stop=stop_after_signal, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "predict", interrupted)
        assert run(shapes_root, tmp_path, *words) == 75
    assert read_json(tmp_path, "status.json")["step"] == step
    assert_saved(tmp_path)
    assert run(shapes_root, tmp_path, "--resume", "auto", *words) == 0
    assert_same_run(tmp_path, finished)
    assert (tmp_path / "samples" / "predictions_00000004.png").is_file()


def test_a_signal_between_the_evaluations_of_two_models(shapes_root, tmp_path, monkeypatch):
    """The resumed run replaces the results of the first model instead of duplicating them."""
    words = ("--ema_decay", "0.5", "--max_steps", "2", "--eval_every", "2")
    original = evaluator.predict

    def interrupted(*args, **kwargs):
        if (tmp_path / "eval" / "step_2").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    def logged_ap() -> list[str]:
        return [key for row in rows(tmp_path) for key in row if key.endswith("/AP")]

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "predict", interrupted)
        assert run(shapes_root, tmp_path, *words) == 75
    assert logged_ap() == ["eval/AP"]
    assert run(shapes_root, tmp_path, *words, "--resume", "auto") == 0
    assert logged_ap() == ["eval/AP", "eval/ema/AP"]
    assert sum("train/loss" in row for row in rows(tmp_path)) == 1


def test_a_signal_during_decoding_stops_before_the_next_token(finished, shapes_root, tmp_path, monkeypatch):
    original, positions = Pix2SeqForObjectDetection.decode_step, []

    def decode_step(self, token_ids, position, *args, **kwargs):
        positions.append(position)
        if position == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, token_ids, position, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Pix2SeqForObjectDetection, "decode_step", decode_step)
        assert run(shapes_root, tmp_path) == 75
    assert positions == list(range(13))  # of 30
    assert read_json(tmp_path, "status.json")["step"] == 3
    assert run(shapes_root, tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, finished)


def test_a_signal_during_a_save_does_not_interrupt_it(finished, shapes_root, tmp_path, monkeypatch):
    original = manifest.write_folder_atomically

    def interrupted(folder, write, *args):
        def write_and_signal(temporary):
            write(temporary)
            if folder.name == "step_00000003":
                os.kill(os.getpid(), signal.SIGUSR1)

        original(folder, write_and_signal, *args)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write_folder_atomically", interrupted)
        assert run(shapes_root, tmp_path) == 75
    assert_saved(tmp_path)
    assert read_json(tmp_path, "status.json")["reason"] == "SIGUSR1"
    folders = {folder.name: manifest.verify(folder) for folder in (tmp_path / "checkpoints").iterdir()}
    assert "step_00000003" in folders
    assert not any(folders.values())
    assert run(shapes_root, tmp_path, "--resume", "auto") == 0
    assert_same_run(tmp_path, finished)


def test_a_run_that_cannot_save_after_a_signal_fails(shapes_root, tmp_path, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    interrupt_at(monkeypatch, 2, signal.SIGTERM)
    monkeypatch.setattr(torch, "save", failing)
    assert run(shapes_root, tmp_path) == 1
    assert "the checkpoint of step 2 could not be written" in capsys.readouterr().err
    assert read_json(tmp_path, "status.json")["state"] == "failed"


def test_ctrl_c_saves_and_exits_with_130(shapes_root, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    assert run(shapes_root, tmp_path) == 130
    assert_saved(tmp_path)


def test_a_second_ctrl_c_ends_the_run_at_once(shapes_root, tmp_path, monkeypatch):
    def interrupted(context, micro_batches):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(shapes_root, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
