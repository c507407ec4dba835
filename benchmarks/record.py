"""Writes a record of a finished run: metrics, command, commit, hardware and arguments.

python -m benchmarks.record runs/demo --output docs/results/demo.json
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
import yaml

from pix2seq.training.run_folder import git_commit

PATH_ARGUMENTS = {"root", "train_images", "train_json", "val_images", "val_json", "output_dir", "config"}


def record(run: Path) -> dict:
    """The record of a run folder."""
    status = json.loads((run / "status.json").read_text())
    if status["state"] != "finished":
        raise SystemExit(f"error: {run}: state is {status['state']}, not finished")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/AP" in row]
    environment = json.loads((run / "env.json").read_text())
    # Paths of one machine mean nothing on another.
    environment["command"] = [without_folder(word) for word in environment["command"]]
    arguments = yaml.safe_load((run / "config.yaml").read_text())
    best = max(evaluations, key=lambda row: row["eval/AP"])
    return {
        "environment": environment | {"processor": _processor()},
        "arguments": {k: without_folder(value) for k, value in arguments.items() if k not in PATH_ARGUMENTS},
        "best": {name.removeprefix("eval/"): value for name, value in best.items()},
        "ap_by_step": {row["step"]: row["eval/AP"] for row in evaluations},
        "images_per_s": rows[-2 if "eval/AP" in rows[-1] else -1]["perf/images_per_s"],
    }


def without_folder(value):
    """The name of an absolute path, and any other value unchanged."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def environment(device: torch.device) -> dict:
    """Command, commit, versions and hardware of the running benchmark."""
    words = [without_folder(word) for word in sys.argv[1:]]
    return {
        "command": [f"python -m benchmarks.{Path(sys.argv[0]).stem}", *words],
        "commit": git_commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "num_threads": torch.get_num_threads(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a record of a finished run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.output.write_text(json.dumps(record(args.run), indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
