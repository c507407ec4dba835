"""The user's mistakes are one line each, of train.py and of evaluate.py."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pix2seq import evaluate, train
from pix2seq.argument_parser import parse
from pix2seq.errors import UserError
from pix2seq.evaluate import EvaluateArguments
from tests.runs import arguments, edited


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--root", "nowhere"], ["--root nowhere", "no such folder"]),
        (["--backbone", "nobody/nothing"], ["--backbone nobody/nothing"]),
        (["--backbone", "{model_type: resnetto}"], ["--backbone", "resnetto"]),
        (["--resume", "nowhere"], ["--resume nowhere", "MANIFEST.json"]),
        (["--report_to", "wandbb"], ["--report_to wandbb", "tensorboard"]),
        (["--report_to", "dvclive"], ["--report_to dvclive", "not installed"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(shapes_root, tmp_path, capsys, monkeypatch, words, parts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train.run_training(arguments(shapes_root, tmp_path / "out", *words)) == 2
    assert not (tmp_path / "out").exists(), "a run that cannot start leaves nothing behind"
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert all(part in lines[0] for part in parts), lines


def test_a_mistake_ends_the_program_within_seconds(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "train.py", "--root", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "no such folder" in done.stderr
    assert time.monotonic() - started < 30


def test_fp16_on_a_cpu_is_refused(finished, shapes_root, tmp_path, monkeypatch, capsys):
    """Accelerate takes it, does nothing and says nothing."""
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--mixed_precision", "fp16")) == 2
    fault = "--mixed_precision fp16: needs a GPU; use bf16 or no"
    assert capsys.readouterr().err == f"train.py: error: {fault}\n"
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    words = ["--checkpoint", str(finished / "final"), "--root", str(shapes_root), "--mixed_precision", "fp16"]
    with pytest.raises(UserError, match=fault):
        evaluate.run_evaluation(parse(EvaluateArguments, words))


def test_a_tracker_that_cannot_start_is_a_failed_run(shapes_root, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise RuntimeError("no account")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fails)
    assert train.run_training(arguments(shapes_root, tmp_path / "out", "--report_to", "wandb")) == 2
    assert "--report_to wandb: cannot be started (no account)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


def test_a_training_set_without_objects_is_refused(shapes_root, tmp_path, capsys):
    root = edited(shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].clear())
    assert train.run_training(arguments(root, tmp_path / "out")) == 2
    assert "holds no objects to train on" in capsys.readouterr().err


def damage_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_weight(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.startswith("bridge")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_the_flags(folder: Path) -> None:
    (folder / "MANIFEST.json").unlink()
    (folder / "training.yaml").write_text("a: [")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (damage_weights, "model.safetensors is damaged"),
        (lose_a_weight, "lacks the weights bridge"),
        (lambda folder: (folder / "config.json").write_text("{}"), "holds a model of type None"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "training.yaml").write_text("a: ["), "training.yaml is damaged"),
        (spoil_the_flags, "training.yaml cannot be read"),
    ],
)
def test_evaluate_refuses_a_damaged_detector(finished, shapes_root, tmp_path, damage, part):
    folder = tmp_path / "best"
    shutil.copytree(finished / "best", folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        evaluate.run_evaluation(parse(EvaluateArguments, ["--checkpoint", str(folder), "--root", str(shapes_root)]))
    assert part in str(error.value)


def test_evaluate_asks_for_its_folder_before_it_works(finished, shapes_root, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("")
    words = ["--checkpoint", str(finished / "best"), "--root", str(shapes_root), "--output_dir", str(taken)]
    with pytest.raises(UserError, match="--output_dir"):
        evaluate.run_evaluation(parse(EvaluateArguments, words))


def test_evaluate_refuses_more_objects_than_a_decoder_has_positions_for(shapes_root, tmp_path):
    assert (
        train.run_training(arguments(shapes_root, tmp_path / "out", "--decoder", "transformer", "--max_steps", "1"))
        == 0
    )
    words = ["--checkpoint", str(tmp_path / "out" / "final"), "--root", str(shapes_root), "--max_objects", "50"]
    with pytest.raises(UserError, match="--max_objects 50: this detector can write 6"):
        evaluate.run_evaluation(parse(EvaluateArguments, words))
