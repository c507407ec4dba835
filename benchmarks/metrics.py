"""What the metrics of training cost: steps with and without them, by turns in one run.

python -m benchmarks.metrics --output docs/results/metrics_cpu.json
python -m benchmarks.metrics --output docs/results/metrics_gpu.json --batch_size 32 --mixed_precision bf16

Two recipes: the demo's, whose steps are so short that everything beside the model shows, and an R50 at 640 pixels.
Ratios are of times of the same round; a round times a few steps of each kind, in turn. On a CPU they are seconds of
the processor, which other processes on the machine do not lengthen.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import environment
from benchmarks.train_step import timed
from pix2seq import train
from pix2seq.argument_parser import parse
from pix2seq.arguments import TrainArguments
from pix2seq.data import train_loader
from pix2seq.data.shapes import draw_dataset
from pix2seq.training.metrics import NAMES
from pix2seq.training.preemption import StopRequest

RECIPES = {
    "demo": (["--config", "configs/demo.yaml"], 64, 10),  # flags, pixels of the pictures, steps timed together
    "r50": (["--size", "r50", "--image_size", 640], 640, 1),
}


def seconds_of(step, device: torch.device, count: int) -> float:
    """Of one step."""
    if device.type == "cuda":
        return timed(step, device, count)
    started = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - started) / count


def measure(recipe: str, args: argparse.Namespace, folder: Path) -> dict:
    flags, side, count = RECIPES[recipe]
    flags = [*flags, *(["--batch_size", args.batch_size] if recipe == "r50" else [])]
    flags += ["--mixed_precision", args.mixed_precision]
    root = draw_dataset(folder / f"shapes{side}", num_train=64, num_val=1, size=side, max_shapes=4)
    words = [*flags, "--root", root, "--output_dir", folder / recipe, "--num_workers", 0, "--report_to", "none"]
    training = train.setup(parse(TrainArguments, list(map(str, words))), StopRequest())
    device = training.accelerator.device
    batch = next(iter(train_loader(training.train_set, training.sampler, 0, device.type == "cuda")))
    counting, nothing = train.token_statistics, torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)
    kinds = {"with": counting, "without": lambda *inputs, **named: nothing}
    seconds = {kind: [] for kind in kinds}
    try:
        for number in range(args.rounds + 1):
            for kind in sorted(kinds, reverse=number % 2 == 1):
                train.token_statistics = kinds[kind]
                seconds[kind].append(seconds_of(lambda: train.train_step(training, [batch]), device, count))
    finally:
        train.token_statistics = counting
    seconds = {kind: values[1:] for kind, values in seconds.items()}  # the first round warms up
    ratios = sorted(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    return {
        "seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "times_as_long": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "all_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps with and without their metrics.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch_size", type=int, default=2, help="of the R50 recipe")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = {recipe: measure(recipe, args, Path(folder)) for recipe in args.recipes}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.write_text(json.dumps({"environment": environment(device), "recipes": found}, indent=1) + "\n")
    for recipe, times in found.items():
        print(f"{recipe}: a step takes {times['times_as_long']['median']:.3f} times as long with metrics")


if __name__ == "__main__":
    main()
