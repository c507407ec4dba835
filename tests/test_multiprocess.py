"""Two processes on the CPU give the results of one, and act together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator

from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.manifest import verify
from pix2seq.training import checkpoint
from tests import launched
from tests.runs import (
    NO_EVALUATION,
    TINY,
    VIT,
    edited,
    evaluate_checkpoint,
    final_weights,
    read_json,
    rows,
)

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
MODIFIED = ["tests/launched.py", *TINY, *VIT]


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script on two processes."""
    return subprocess.run([*LAUNCH, *words], capture_output=True, text=True, timeout=300, env=os.environ | environment)


def train_rows(output: Path) -> list[dict]:
    return [row for row in rows(output) if "train/loss" in row]


def assert_close_steps(output: Path, expected: Path) -> float:
    """Asserts that two runs took the same steps up to rounding; returns the largest relative difference of losses."""
    differences = []
    for row, expected_row in zip(train_rows(output), train_rows(expected), strict=True):
        assert row["step"] == expected_row["step"]
        for key in ("train/loss", "train/grad_norm", "train/lr"):
            assert row[key] == pytest.approx(expected_row[key], rel=1e-4)
        differences.append(abs(row["train/loss"] / expected_row["train/loss"] - 1))
    return max(differences)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_number_of_processes(shapes_root, tmp_path):
    """The validation set has an odd number of images."""
    words = ["--root", str(shapes_root), "--output_dir"]
    done = launch("train.py", *TINY, "--batch_size", "2", *words, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in (tmp_path / "out" / "train.log").read_text()
    done = launch("evaluate.py", "--checkpoint", str(tmp_path / "out" / "final"), *words, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    metrics = evaluate_checkpoint(tmp_path / "out" / "final", shapes_root, "--output_dir", str(tmp_path / "one"))
    assert read_json(tmp_path, "two/metrics.json") == metrics == read_json(tmp_path, "out/eval/step_6/metrics.json")
    predictions = read_json(tmp_path, "two/predictions.json")
    assert predictions == read_json(tmp_path, "one/predictions.json")
    assert sorted(entry["image_id"] for entry in predictions) == sorted([1, 2, 3, 4, 5] * 6)  # 6 objects per image


def test_gradients_do_not_depend_on_how_a_step_is_split(shapes_root, tmp_path, monkeypatch, record_property):
    """Over micro-batches and processes, up to the rounding of float32."""
    words = [*MODIFIED, "--root", str(shapes_root), "--max_steps", "1", "--eval_every", "0", "--no_noise_objects"]

    def gradients(processes: int, accumulation: int) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{processes}x{accumulation}"
        split = ["--batch_size", str(4 // processes // accumulation)]
        split += ["--gradient_accumulation_steps", str(accumulation), "--output_dir", f"{file}.out"]
        if processes > 1:
            done = launch(*words, *split, GRADIENTS=str(file))
            assert done.returncode == 0, done.stderr
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Accelerator, "clip_grad_norm_", Accelerator.clip_grad_norm_)  # to restore it afterwards
                launched.write_gradients(str(file))
                assert train.run_training(parse(TrainArguments, [*words[1:], *split])) == 0
        return torch.load(file)

    def norm(tensors) -> float:
        return sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()

    whole = gradients(1, 1)
    assert norm(whole.values()) > 0.1
    differences = []
    for split in ((1, 4), (2, 1), (2, 2)):
        parts = gradients(*split)
        assert parts.keys() == whole.keys()
        differences.append(norm(parts[name] - whole[name] for name in whole) / norm(whole.values()))
    record_property("relative_gradient_difference", max(differences))
    assert max(differences) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_resume_with_another_number_of_processes(shapes_root, tmp_path, record_property, first, second):
    common = [*TINY, *VIT, "--root", str(shapes_root), "--log_every", "1", *NO_EVALUATION]
    common += ["--lr_scheduler", "constant"]

    def run(processes: int, output: Path, *words: str) -> None:
        words = [*common, "--output_dir", str(output), "--batch_size", str(4 // processes), *words]
        if processes == 1:
            assert train.run_training(parse(TrainArguments, words)) == 0
        else:
            done = launch("train.py", *words)
            assert done.returncode == 0, done.stderr

    run(1, tmp_path / "whole", "--max_steps", "5")
    run(first, tmp_path / "resumed", "--max_steps", "3")
    run(second, tmp_path / "resumed", "--max_steps", "5", "--resume", "auto")
    record_property("relative_loss_difference", assert_close_steps(tmp_path / "resumed", tmp_path / "whole"))


@pytest.mark.slow
def test_fsdp_takes_the_same_steps_and_writes_plain_checkpoints(shapes_root, tmp_path, record_property):
    """Sharded and plain runs resume from the checkpoints of each other."""
    words = [*MODIFIED, "--root", str(shapes_root), "--log_every", "1", "--lr_scheduler", "constant"]
    words += ["--eval_every", "2", "--sample_every", "2", "--ckpt_every", "2", "--batch_size", "2"]

    def run(name: str, max_steps: int, *more: str, **environment: str) -> None:
        output = ["--output_dir", str(tmp_path / name), "--max_steps", str(max_steps)]
        done = launch(*words, *output, *more, **environment)
        assert done.returncode == 0, done.stderr

    run("plain", 4)
    run("sharded", 4, SHARD="1")
    run("sharded_then_plain", 2, SHARD="1")
    run("sharded_then_plain", 4, "--resume", "auto")
    run("plain_then_sharded", 2)
    run("plain_then_sharded", 4, "--resume", "auto", SHARD="1")
    expected, differences = final_weights(tmp_path / "plain"), []
    for name in ("sharded", "sharded_then_plain", "plain_then_sharded"):
        differences.append(assert_close_steps(tmp_path / name, tmp_path / "plain"))
        weights = final_weights(tmp_path / name)
        assert weights.keys() == expected.keys()
        for key in expected:  # the first steps of Adam depend on signs
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-3, atol=2e-4)
    record_property("relative_loss_difference", max(differences))
    metrics = evaluate_checkpoint(tmp_path / "sharded" / "final", shapes_root)
    assert metrics == read_json(tmp_path, "sharded/eval/step_4/metrics.json")


def test_fsdp_with_ema_is_an_error(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setattr(train, "make_accelerator", train.make_accelerator)  # to restore it afterwards
    launched.shard()
    words = ["--root", str(shapes_root), "--output_dir", str(tmp_path), "--ema_decay", "0.9"]
    assert train.run_training(parse(TrainArguments, [*MODIFIED[1:], *words])) == 2
    assert "--ema_decay" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_without_a_shared_run_folder_are_an_error(shapes_root, tmp_path):
    """Otherwise one process would resume and the other start anew, on other data."""
    words = [*MODIFIED, "--root", str(shapes_root), "--batch_size", "2", *NO_EVALUATION]
    words += ["--output_dir", str(tmp_path / "out"), "--lr_scheduler", "constant"]
    assert launch(*words, "--max_steps", "3").returncode == 0
    done = launch(*words, "--max_steps", "6", "--resume", "auto", SPLIT="1")
    assert done.returncode != 0
    assert "[3, 0]; all nodes must share this folder" in done.stderr
    assert checkpoint.latest_checkpoint(tmp_path / "out" / "checkpoints").name == "step_00000003"


@pytest.mark.slow
def test_a_crashed_run_that_the_launcher_restarts_resumes(shapes_root, tmp_path):
    words = ["--rdzv_backend", "c10d", "--max_restarts", "1", *MODIFIED, "--root", str(shapes_root)]
    words += ["--output_dir", str(tmp_path), "--log_every", "1", "--ckpt_every", "1", "--batch_size", "2"]
    done = launch(*words, CRASH_AT="4")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {tmp_path / 'checkpoints' / 'step_00000003'}" in (tmp_path / "train.log").read_text()
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert read_json(tmp_path, "status.json")["state"] == "finished"
    # A new launch does not resume without --resume, even if it is restarted.
    done = launch(*words)
    assert done.returncode != 0
    assert "holds checkpoints of an earlier run" in done.stderr


@pytest.mark.slow
def test_two_processes_print_an_error_once(tmp_path):
    done = launch("train.py", "--root", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("train.py: error:") == 1


def test_a_process_without_loss_weight(shapes_root, tmp_path):
    """Two of twelve images have objects, and EOS has weight 0."""
    root = edited(
        shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].__delitem__(slice(4, None))
    )
    words = ["--no_noise_objects", "--eos_weight", "0", "--batch_size", "1", "--output_dir", str(tmp_path / "out")]
    done = launch("train.py", *TINY, "--root", str(root), *words)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path, "out/status.json")["state"] == "finished"


@pytest.mark.parametrize(
    ("during", "target", "number"),
    [
        ("evaluation", "launcher", signal.SIGTERM),
        pytest.param("save", "launcher", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("training", "one worker", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_save_together_after_a_signal(shapes_root, tmp_path, record_property, during, target, number):
    """The signal goes to the launcher, as from a scheduler, or to one process."""
    every = {"evaluation": "--eval_every", "save": "--ckpt_every", "training": "--log_every"}[during]
    words = [*TINY, *NO_EVALUATION, "--root", str(shapes_root), "--output_dir", str(tmp_path), "--batch_size", "2"]
    words += ["--eval_batch_size", "1", "--max_objects", "60", "--max_steps", "100000", "--ckpt_every", "0"]
    words += [every, "1"]

    def reached() -> bool:
        if during == "evaluation":
            return (tmp_path / "eval").exists()
        if during == "save":
            return any((tmp_path / "checkpoints").glob(".tmp-*"))
        return (tmp_path / "metrics.jsonl").exists()

    launcher = subprocess.Popen([*LAUNCH, "train.py", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [child for child in psutil.Process(launcher.pid).children() if "train.py" in child.cmdline()]
        assert len(workers) == 2
        signalled = time.monotonic()
        os.kill(launcher.pid if target == "launcher" else workers[1].pid, number)
        launcher.wait(timeout=60)
        seconds = time.monotonic() - signalled
        record_property("seconds_from_signal_to_end", seconds)
        assert seconds < 20
    finally:
        launcher.kill()
    status = read_json(tmp_path, "status.json")
    assert status["state"] == "preempted"
    assert checkpoint.latest_checkpoint(tmp_path / "checkpoints").name == f"step_{status['step']:08d}"


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_both(shapes_root, tmp_path):
    """Both save and stop at the same step."""
    annotations = shapes_root / "annotations" / "instances_train2017.json"
    names = [entry["file_name"] for entry in read_json(annotations)["images"]]
    images = tmp_path / "images"
    images.mkdir()
    for index, name in enumerate(names):
        data = (shapes_root / "images/train2017" / name).read_bytes()
        (images / name).write_bytes(data[:100] if index == 7 else data)
    output = tmp_path / "out"
    words = ["--train_images", str(images), "--train_json", str(annotations), "--output_dir", str(output)]
    words += ["--val_images", str(shapes_root / "images/val2017")]
    words += ["--val_json", str(shapes_root / "annotations/instances_val2017.json")]
    done = launch("train.py", *TINY, *NO_EVALUATION, *words, "--batch_size", "2")
    assert done.returncode != 0
    status = read_json(output, "status.json")
    assert status["state"] == "failed"
    assert f"{names[7]}: " in status["reason"]
    assert "--max_unreadable" in status["reason"]
    assert 1 <= status["step"] <= 3  # an epoch
    assert verify(output / f"checkpoints/step_{status['step']:08d}") is None
