"""Small whole runs of train.py, for tests of many subjects."""

import json
import os
import shutil
import signal
from pathlib import Path

from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments

TINY = [
    *(
        "--backbone",
        "{model_type: resnet, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}",
    ),
    *("--hidden_size", "16", "--encoder_layers", "1", "--decoder_layers", "1", "--num_heads", "2", "--mlp_size", "32"),
    *("--drop_path", "0.05"),
    *("--image_size", "64", "--num_bins", "32", "--max_objects", "6", "--batch_size", "4", "--eval_batch_size", "4"),
    *("--num_workers", "0", "--lr", "1e-3", "--warmup_steps", "2", "--max_steps", "6"),
    *("--log_every", "2", "--eval_every", "3", "--sample_every", "4", "--ckpt_every", "3"),
]


def arguments(root: Path, output: Path, *words: str) -> TrainArguments:
    return parse(TrainArguments, [*TINY, "--root", str(root), "--output_dir", str(output), *words])


def rows(output: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def interrupt_at(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process a signal while the given step is being taken."""
    original = train.train_step

    def interrupted(training, micro_batches):
        if training.step == step - 1:
            os.kill(os.getpid(), number)
        return original(training, micro_batches)

    monkeypatch.setattr(train, "train_step", interrupted)


def edited(root: Path, folder: Path, split: str, edit) -> Path:
    """A copy of a dataset with one annotation file changed."""
    shutil.copytree(root, folder)
    path = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return folder
