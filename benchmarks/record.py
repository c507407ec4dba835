"""Turns a finished run into a record for docs/results: metrics, command, commit, hardware, flags.

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

PLACES = {"root", "train_images", "train_json", "val_images", "val_json", "output_dir", "config"}


def record(run: Path) -> dict:
    status = json.loads((run / "status.json").read_text())
    if status["state"] != "finished":
        raise SystemExit(f"error: {run}: its state is {status['state']}, not finished")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/AP" in row]
    environment = json.loads((run / "env.json").read_text())
    # Where things lie on one machine says nothing on another.
    environment["command"] = [Path(word).name if word.startswith("/") else word for word in environment["command"]]
    flags = yaml.safe_load((run / "config.yaml").read_text())
    best = max(evaluations, key=lambda row: row["eval/AP"])
    return {
        "environment": environment | {"processor": _processor()},
        "flags": {name: value for name, value in flags.items() if name not in PLACES},
        "best": {name.removeprefix("eval/"): value for name, value in best.items()},
        "ap_by_step": {row["step"]: row["eval/AP"] for row in evaluations},
        "images_per_s": rows[-2 if "eval/AP" in rows[-1] else -1]["perf/images_per_s"],
    }


def environment(device: torch.device) -> dict:
    """Of a benchmark's own process."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
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
    parser = argparse.ArgumentParser(description="Turn a finished run into a record.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    args.output.write_text(json.dumps(record(args.run), indent=1) + "\n")
    print(args.output)


if __name__ == "__main__":
    main()
