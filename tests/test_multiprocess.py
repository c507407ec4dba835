"""Two processes on the CPU: the same numbers as one, and every image counted once."""

import json
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
from safetensors.torch import load_file

from pix2seq import evaluate, train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.evaluate import EvaluateArguments
from pix2seq.training import checkpoint
from tests import launched
from tests.runs import TINY, edited, rows

VIT = "{model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, "
VIT += "patch_size: 16, image_size: 64}"


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([*LAUNCH, *words], capture_output=True, text=True, timeout=300, env=os.environ | environment)


@pytest.fixture(scope="module")
def two(shapes_root, tmp_path_factory) -> Path:
    """A run on two processes with a validation set of odd size and batch norms."""
    output = tmp_path_factory.mktemp("two") / "out"
    done = launch("train.py", *TINY, "--root", str(shapes_root), "--output_dir", str(output), "--batch_size", "2")
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in (output / "train.log").read_text()
    return output


def test_the_ap_of_a_checkpoint_does_not_depend_on_the_number_of_processes(two, shapes_root, tmp_path):
    trained = json.loads((two / "eval" / "step_6" / "metrics.json").read_text())
    words = ["--checkpoint", str(two / "final"), "--root", str(shapes_root)]
    done = launch("evaluate.py", *words, "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    alone = evaluate.run_evaluation(parse(EvaluateArguments, [*words, "--output_dir", str(tmp_path / "one")]))
    assert json.loads((tmp_path / "two" / "metrics.json").read_text()) == alone == trained
    predictions = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "two")]
    assert predictions[0] == predictions[1]
    # 5 images, an odd number, 6 objects each: none twice, none missing.
    assert sorted(row["image_id"] for row in predictions[1]) == sorted([1, 2, 3, 4, 5] * 6)


def test_two_processes_take_the_steps_one_would(shapes_root, tmp_path):
    """Same samples, same loss and gradient: the loss is normalised by the weight of all tokens of all ranks. Rank 1
    has other numbers of objects than rank 0, so a mean of means would differ."""
    common = [
        *TINY,
        "--root",
        str(shapes_root),
        "--backbone",
        VIT,
        "--dropout",
        "0",
        "--drop_path",
        "0",
        "--log_every",
        "1",
    ]
    common += ["--log_every", "1", "--eval_every", "0", "--sample_every", "0", "--no_noise_objects"]
    done = launch("train.py", *common, "--batch_size", "2", "--output_dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert (
        train.run_training(
            parse(TrainArguments, [*common, "--batch_size", "4", "--output_dir", str(tmp_path / "one")])
        )
        == 0
    )
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in {"train/loss", "train/grad_norm", "train/lr"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4)


PARTS = ["tests/launched.py", *TINY, "--backbone", VIT, "--dropout", "0", "--drop_path", "0"]


def test_gradients_do_not_depend_on_how_a_step_is_split(shapes_root, tmp_path, monkeypatch, record_property):
    """One process, accumulation, two processes, both: 1e-6 of the gradient's norm, rounding of float32."""
    words = [*PARTS, "--root", str(shapes_root), "--max_steps", "1", "--eval_every", "0", "--no_noise_objects"]

    def gradients(processes: int, accumulation: int) -> dict[str, torch.Tensor]:
        file = tmp_path / f"{processes}x{accumulation}"
        split = ["--batch_size", str(4 // processes // accumulation)]
        split += ["--gradient_accumulation_steps", str(accumulation), "--output_dir", f"{file}.out"]
        if processes > 1:
            done = launch(*words, *split, GRADIENTS=str(file))
            assert done.returncode == 0, done.stderr
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Accelerator, "clip_grad_norm_", Accelerator.clip_grad_norm_)  # is put back
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
def test_a_sharded_run_is_the_run_it_would_be_whole(shapes_root, tmp_path, record_property):
    """FSDP2: the losses of a plain run, detectors that anybody loads, and checkpoints that go on sharded or not."""
    words = [*PARTS, "--root", str(shapes_root), "--log_every", "1", "--eval_every", "2", "--lr_scheduler", "constant"]
    words += ["--sample_every", "2", "--ckpt_every", "2"]

    def take(output: Path, *more: str, **environment: str) -> None:
        done = launch(*words, "--batch_size", "2", "--output_dir", str(output), *more, **environment)
        assert done.returncode == 0, done.stderr

    take(tmp_path / "plain", "--max_steps", "4")
    take(tmp_path / "sharded", "--max_steps", "4", SHARD="1")
    take(tmp_path / "first", "--max_steps", "2", SHARD="1")
    take(tmp_path / "first", "--max_steps", "4", "--resume", "auto")
    take(tmp_path / "then", "--max_steps", "2")
    take(tmp_path / "then", "--max_steps", "4", "--resume", "auto", SHARD="1")
    expected = [row for row in rows(tmp_path / "plain") if "train/loss" in row]
    weights = load_file(tmp_path / "plain" / "final" / "model.safetensors")
    differences = []
    for name in ("sharded", "first", "then"):
        found = [row for row in rows(tmp_path / name) if "train/loss" in row]
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        for row, other in zip(expected, found, strict=True):
            for key in ("train/loss", "train/grad_norm", "train/lr"):
                assert other[key] == pytest.approx(row[key], rel=1e-4)
            differences.append(abs(other["train/loss"] / row["train/loss"] - 1))
        ours = load_file(tmp_path / name / "final" / "model.safetensors")
        assert ours.keys() == weights.keys()
        for key in weights:
            torch.testing.assert_close(ours[key], weights[key], rtol=1e-3, atol=2e-4)  # Adam's first steps are signs
    record_property("relative_loss_difference", max(differences))
    metrics = evaluate.run_evaluation(
        parse(EvaluateArguments, ["--checkpoint", str(tmp_path / "sharded/final"), "--root", str(shapes_root)])
    )
    assert metrics == json.loads((tmp_path / "sharded" / "eval" / "step_4" / "metrics.json").read_text())


def test_averaging_sharded_weights_is_refused(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    monkeypatch.setattr(train, "make_accelerator", train.make_accelerator)  # is put back
    launched.shard()
    words = ["--root", str(shapes_root), "--output_dir", str(tmp_path / "out"), "--ema_decay", "0.9"]
    assert train.run_training(parse(TrainArguments, [*PARTS[1:], *words])) == 2
    assert "--ema_decay" in capsys.readouterr().err


@pytest.mark.slow
def test_nodes_that_do_not_share_the_run_folder_are_told(shapes_root, tmp_path):
    """Or one would go on with step 4 while the other begins with step 1, on other data."""
    words = [*PARTS, "--root", str(shapes_root), "--batch_size", "2", "--eval_every", "0", "--sample_every", "0"]
    words += ["--output_dir", str(tmp_path / "out"), "--lr_scheduler", "constant"]
    assert launch(*words, "--max_steps", "3").returncode == 0
    done = launch(*words, "--max_steps", "6", "--resume", "auto", SPLIT="1")
    assert done.returncode != 0
    assert "processes stand at steps [3, 0]; all nodes have to share this folder" in done.stderr
    assert checkpoint.latest(tmp_path / "out" / "checkpoints").name == "step_00000003"


@pytest.mark.slow
def test_a_crashed_run_goes_on_by_itself_where_the_launcher_may_restart_it(shapes_root, tmp_path):
    output = tmp_path / "out"
    words = [*PARTS, "--root", str(shapes_root), "--log_every", "1", "--ckpt_every", "1", "--output_dir", str(output)]
    words += ["--batch_size", "2"]
    restarting = ["--rdzv_backend", "c10d", "--max_restarts", "1", *words]
    done = launch(*restarting, CRASH_AT="4")
    assert done.returncode == 0, done.stderr
    assert f"resumed from {output / 'checkpoints' / 'step_00000003'}" in (output / "train.log").read_text()
    assert [row["step"] for row in rows(output) if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert json.loads((output / "status.json").read_text())["state"] == "finished"
    # Another launch does not go on with it unasked, however often it is restarted.
    done = launch(*restarting)
    assert done.returncode != 0
    assert "holds checkpoints of an earlier run" in done.stderr


def test_a_mistake_is_told_once_by_two_processes(tmp_path):
    done = launch("train.py", "--root", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("train.py: error:") == 1


@pytest.mark.parametrize(("first", "then"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(shapes_root, tmp_path, record_property, first, then):
    """Same global batch, so the same samples make up a step; only the order of sums differs."""
    common = [*TINY, "--root", str(shapes_root), "--backbone", VIT, "--dropout", "0", "--drop_path", "0"]
    common += ["--log_every", "1", "--eval_every", "0", "--sample_every", "0", "--lr_scheduler", "constant"]

    def take(processes: int, output: Path, *words: str) -> None:
        words = [*common, "--output_dir", str(output), "--batch_size", str(4 // processes), *words]
        if processes == 1:
            assert train.run_training(parse(TrainArguments, words)) == 0
        else:
            done = launch("train.py", *words)
            assert done.returncode == 0, done.stderr

    take(1, tmp_path / "whole", "--max_steps", "5")
    take(first, tmp_path / "parts", "--max_steps", "3")
    take(then, tmp_path / "parts", "--max_steps", "5", "--resume", "auto")
    expected = {row["step"]: row for row in rows(tmp_path / "whole") if "train/loss" in row}
    found = {row["step"]: row for row in rows(tmp_path / "parts") if "train/loss" in row}
    assert found.keys() == expected.keys() == {1, 2, 3, 4, 5}
    losses = [(found[step]["train/loss"], row["train/loss"]) for step, row in expected.items()]
    record_property("relative_loss_difference", max(abs(a / b - 1) for a, b in losses))
    for step, row in expected.items():
        for key in ("train/loss", "train/grad_norm", "train/lr"):
            assert found[step][key] == pytest.approx(row[key], rel=1e-4)


def test_a_rank_without_a_single_token_of_weight_hangs_nothing(shapes_root, tmp_path):
    """Two pictures of twelve have objects, and an end that does not count: most ranks of most steps have nothing."""
    root = edited(
        shapes_root, tmp_path / "data", "train", lambda content: content["annotations"].__delitem__(slice(4, None))
    )
    words = ["--no_noise_objects", "--eos_weight", "0", "--batch_size", "1", "--output_dir", str(tmp_path / "out")]
    done = launch("train.py", *TINY, "--root", str(root), *words)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("when", "target", "number"),
    [
        ("evaluation", "launcher", signal.SIGTERM),
        pytest.param("save", "launcher", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("training", "one worker", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_told_to_stop_save_together(shapes_root, tmp_path, record_property, when, target, number):
    """The launcher gets the signal, as from a scheduler, or one of its workers alone."""
    output = tmp_path / "out"
    often = {"evaluation": "--eval_every", "save": "--ckpt_every", "training": "--log_every"}[when]
    words = [*TINY, "--root", str(shapes_root), "--output_dir", str(output), "--batch_size", "2"]
    words += ["--eval_batch_size", "1", "--max_objects", "60", "--max_steps", "100000", "--eval_every", "0"]
    words += ["--sample_every", "0", "--ckpt_every", "0", often, "1"]

    def is_time() -> bool:
        if when == "evaluation":
            return (output / "eval").exists()
        if when == "save":
            return any((output / "checkpoints").glob(".tmp-*"))
        return (output / "metrics.jsonl").exists()

    launcher = subprocess.Popen([*LAUNCH, "train.py", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not is_time() and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = [child for child in psutil.Process(launcher.pid).children() if "train.py" in child.cmdline()]
        assert len(workers) == 2
        told = time.monotonic()
        os.kill(launcher.pid if target == "launcher" else workers[1].pid, number)
        launcher.wait(timeout=60)
        seconds = time.monotonic() - told
        record_property("seconds_from_signal_to_end", seconds)
        assert seconds < 20
    finally:
        launcher.kill()
    status = json.loads((output / "status.json").read_text())
    assert status["state"] == "preempted"
    assert checkpoint.latest(output / "checkpoints").name == f"step_{status['step']:08d}"


def test_an_image_that_one_process_cannot_read_is_known_to_both(shapes_root, tmp_path):
    """Both count it, save, and stop at the same step: neither waits for the other."""
    content = json.loads((shapes_root / "annotations/instances_train2017.json").read_text())
    images = tmp_path / "images"
    images.mkdir()
    for index, entry in enumerate(content["images"]):
        data = (shapes_root / "images/train2017" / entry["file_name"]).read_bytes()
        (images / entry["file_name"]).write_bytes(data[:100] if index == 7 else data)
    output = tmp_path / "out"
    words = ["--train_images", str(images), "--train_json", str(shapes_root / "annotations/instances_train2017.json")]
    words += ["--val_images", str(shapes_root / "images/val2017"), "--sample_every", "0", "--eval_every", "0"]
    words += ["--val_json", str(shapes_root / "annotations/instances_val2017.json"), "--output_dir", str(output)]
    done = launch("train.py", *TINY, *words, "--batch_size", "2")
    assert done.returncode != 0
    status = json.loads((output / "status.json").read_text())
    assert status["state"] == "failed"
    assert f"{content['images'][7]['file_name']}: " in status["reason"]
    assert "1 training images are missing or broken" in status["reason"]
    assert 1 <= status["step"] <= 3  # of 4 images each: the 12 of them
    assert checkpoint.verify(output / f"checkpoints/step_{status['step']:08d}") is None
