"""Two processes on the CPU: the same numbers as one, and every image counted once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import train
from pix2seq.command_line import parse
from pix2seq.config import Arguments, EvaluateArguments
from tests.test_train import TINY, rows

VIT = "{model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, "
VIT += "patch_size: 16, image_size: 64}"


def launch(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)


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
    alone = evaluate.main(parse(EvaluateArguments, [*words, "--output_dir", str(tmp_path / "one")]))
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
    assert train.main(parse(Arguments, [*common, "--batch_size", "4", "--output_dir", str(tmp_path / "one")])) == 0
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in {"train/loss", "train/grad_norm", "train/lr"} & one.keys():
            assert two[key] == pytest.approx(one[key], rel=1e-4)


def test_a_mistake_is_told_once_by_two_processes(tmp_path):
    done = launch("train.py", "--root", str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert done.stderr.count("train.py: error:") == 1
