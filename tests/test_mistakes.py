"""Errors of the user: one line that names the argument or file, and exit code 2."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pix2seq.errors import UserError
from tests.runs import edited, evaluate_checkpoint, read_json, run


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--root", "nowhere"], ["--root nowhere", "no such folder"]),
        (["--backbone", "nobody/nothing"], ["--backbone nobody/nothing"]),
        (["--backbone", "{model_type: resnetto}"], ["--backbone", "resnetto"]),
        (["--resume", "nowhere"], ["--resume nowhere", "MANIFEST.json"]),
        (["--report_to", "wandbb"], ["--report_to wandbb", "tensorboard"]),
        (["--report_to", "dvclive"], ["--report_to dvclive", "not installed"]),
        (["--mixed_precision", "fp16"], ["--mixed_precision fp16", "needs a GPU"]),
    ],
)
def test_a_wrong_argument_of_training(shapes_root, tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert run(shapes_root, tmp_path / "out", *words) == 2
    assert not (tmp_path / "out").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train.py: error: ")
    assert all(part in lines[0] for part in parts), lines


def test_a_wrong_argument_ends_the_program_within_seconds(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "train.py", "--root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]  # other libraries may print warnings before
    assert message.startswith("train.py: error: --root")
    assert "no such folder" in message
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 30


def test_a_tracker_that_cannot_start(shapes_root, tmp_path, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise RuntimeError("no account")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", failing)
    assert run(shapes_root, tmp_path, "--report_to", "wandb") == 2
    error = capsys.readouterr().err
    assert "--report_to wandb" in error
    assert "no account" in error
    assert read_json(tmp_path, "status.json")["state"] == "failed"


def test_a_training_set_without_objects(shapes_root, tmp_path, capsys):
    root = edited(shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].clear())
    assert run(root, tmp_path / "out") == 2
    assert "instances_train2017.json: has no objects" in capsys.readouterr().err


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_a_weight(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.startswith("projector")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def break_unlisted_arguments(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    (folder / "training.yaml").write_text("a: [")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (truncate_weights, "model.safetensors"),
        (remove_a_weight, "projector"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model of type None"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "training.yaml").write_text("a: ["), "training.yaml"),
        (break_unlisted_arguments, "training.yaml cannot be read"),
    ],
)
def test_evaluating_a_damaged_model(finished, shapes_root, tmp_path, damage, part):
    folder = shutil.copytree(finished / "best", tmp_path / "best")
    damage(folder)
    with pytest.raises(UserError) as error:
        evaluate_checkpoint(folder, shapes_root)
    assert part in str(error.value)


@pytest.mark.parametrize("argument", ["--output_dir", "--mixed_precision"])
def test_a_wrong_argument_of_evaluation(finished, shapes_root, tmp_path, monkeypatch, argument):
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    (tmp_path / "file").write_text("")
    value = {"--output_dir": str(tmp_path / "file"), "--mixed_precision": "fp16"}[argument]
    with pytest.raises(UserError, match=argument):
        evaluate_checkpoint(finished / "best", shapes_root, argument, value)


def test_evaluating_with_more_objects_than_the_decoder_has_positions(shapes_root, tmp_path):
    assert run(shapes_root, tmp_path, "--decoder", "transformer", "--max_steps", "1") == 0
    with pytest.raises(UserError, match=r"--max_objects 50: .* 6"):
        evaluate_checkpoint(tmp_path / "final", shapes_root, "--max_objects", "50")
