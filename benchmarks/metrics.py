"""Times training steps with and without their metrics, alternately in one run.

python -m benchmarks.metrics --output docs/results/metrics_cpu.json
python -m benchmarks.metrics --output docs/results/metrics_gpu.json --batch_size 32 --mixed_precision bf16

Two recipes are timed: the demo, whose steps are so short that any overhead is visible, and a ResNet-50 at 640 pixels.
Each ratio is of times of the same round. On a CPU the times are process times, which other processes do not affect.
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
    "demo": (["--config", "configs/demo.yaml"], 64, 10),  # arguments, image size, steps timed together
    "r50": (["--preset", "r50", "--image_size", 640], 640, 1),
}


def seconds_per_step(step, device: torch.device, count: int) -> float:
    if device.type == "cuda":
        return timed(step, device, count)
    started = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - started) / count


def measure(recipe: str, args: argparse.Namespace, folder: Path) -> dict:
    argv, side, count = RECIPES[recipe]
    argv = [*argv, *(["--batch_size", args.batch_size] if recipe == "r50" else [])]
    argv += ["--mixed_precision", args.mixed_precision]
    root = draw_dataset(folder / f"shapes{side}", num_train=64, num_val=1, size=side, max_shapes=4)
    argv = [*argv, "--root", root, "--output_dir", folder / recipe, "--num_workers", 0, "--report_to", "none"]
    context = train.setup(parse(TrainArguments, list(map(str, argv))), StopRequest())
    device = context.accelerator.device
    batch = next(iter(train_loader(context.train_set, context.sampler, 0, device.type == "cuda")))
    token_statistics, zeros = train.token_statistics, torch.zeros(2, len(NAMES), dtype=torch.float64, device=device)
    variants = {"with": token_statistics, "without": lambda *args, **kwargs: zeros}
    seconds = {name: [] for name in variants}
    try:
        for number in range(args.rounds + 1):
            for name in sorted(variants, reverse=number % 2 == 1):
                train.token_statistics = variants[name]
                seconds[name].append(seconds_per_step(lambda: train.train_step(context, [batch]), device, count))
    finally:
        train.token_statistics = token_statistics
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    ratios = sorted(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True))
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "times_as_long": {"median": statistics.median(ratios), "min": ratios[0], "max": ratios[-1]},
        "all_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time training steps with and without their metrics.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batch_size", type=int, default=2, help="batch size of the ResNet-50")
    parser.add_argument("--mixed_precision", default="no", choices=["no", "fp16", "bf16"])
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES], choices=[*RECIPES])
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        results = {recipe: measure(recipe, args, Path(folder)) for recipe in args.recipes}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output.write_text(json.dumps({"environment": environment(device), "recipes": results}, indent=1) + "\n")
    for recipe, times in results.items():
        print(f"{recipe}: a step with metrics takes {times['times_as_long']['median']:.3f} times as long")


if __name__ == "__main__":
    main()
