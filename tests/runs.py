"""Small complete training runs, for tests."""

import json
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from pix2seq import evaluate, train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.evaluate import EvaluateArguments

TINY = [
    "--backbone",
    "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    *("--hidden_size", "16", "--encoder_layers", "1", "--decoder_layers", "1", "--num_heads", "2", "--mlp_size", "32"),
    *("--drop_path", "0.05"),
    *("--image_size", "64", "--num_bins", "32", "--max_objects", "6", "--batch_size", "4", "--eval_batch_size", "4"),
    *("--num_workers", "0", "--lr", "1e-3", "--warmup_steps", "2", "--max_steps", "6"),
    *("--log_every", "2", "--eval_every", "3", "--sample_every", "4", "--ckpt_every", "3"),
]
VIT = [  # no batch norm, no dropout: a step does not depend on how it is split
    "--backbone",
    "{model_type: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32, "
    "patch_size: 16, image_size: 64}",
    *("--dropout", "0", "--drop_path", "0"),
]
NO_EVALUATION = ["--eval_every", "0", "--sample_every", "0"]


def arguments(root: Path, output: Path, *words: str) -> TrainArguments:
    """Arguments of a tiny run."""
    return parse(TrainArguments, [*TINY, "--root", str(root), "--output_dir", str(output), *words])


def run(root: Path, output: Path, *words: str) -> int:
    """Trains in this process; returns the exit code."""
    return train.run_training(arguments(root, output, *words))


def evaluate_checkpoint(checkpoint: Path, root: Path | None = None, *words: str) -> dict[str, float]:
    """Metrics of evaluate.py; without `root`, on the dataset of the training run."""
    words = ["--checkpoint", str(checkpoint), *(["--root", str(root)] if root else []), "--num_workers", "0", *words]
    return evaluate.run_evaluation(parse(EvaluateArguments, words))


def read_json(*parts: str | Path) -> dict:
    return json.loads(Path(*parts).read_text())


def rows(output: Path) -> list[dict]:
    """The rows of metrics.jsonl without timings."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


def assert_same_run(output: Path, expected: Path) -> None:
    """Asserts that two runs logged the same metrics and have bitwise identical final weights."""
    assert rows(output) == rows(expected)
    weights, expected_weights = final_weights(output), final_weights(expected)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def interrupt_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal during the given step."""
    original = train.train_step

    def interrupted(context, micro_batches):
        if context.step == step - 1:
            os.kill(os.getpid(), number)
        return original(context, micro_batches)

    monkeypatch.setattr(train, "train_step", interrupted)


def edited(root: Path, folder: Path, split: str, edit) -> Path:
    """Copies a dataset and applies `edit` to the content of one annotation file."""
    shutil.copytree(root, folder)
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return folder
