"""The dataset commands of `pix2seq`: check, show, convert and shard.

check, show and shard take the arguments of `train.py`, recipes included.
"""

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pix2seq.argument_parser import LineErrorParser, parse, run_command
from pix2seq.arguments import TrainArguments, argument
from pix2seq.data.check import check
from pix2seq.data.coco import load_annotations
from pix2seq.data.convert import convert
from pix2seq.data.issues import ERROR
from pix2seq.data.shards import write_shards
from pix2seq.data.show import show
from pix2seq.errors import UserError
from pix2seq.training.datasets import find_splits, load_data


def check_data(args: TrainArguments) -> int:
    """Prints what is in a dataset and what is wrong with it, and writes it into the run folder; the exit code."""
    report = check(*find_splits(args), args.follow_links, args.max_objects, min(args.num_workers, os.cpu_count() or 1))
    folder = Path(args.output_dir) / "data"
    print(report)
    try:
        report.write(folder)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir}: cannot be written to ({error.strerror})") from None
    print(f"written to {folder}: check.json" + (", check.png" if report.draw is not None else ""))
    return 2 if report.of(ERROR) else 0


@dataclass
class ShowArguments(TrainArguments):
    output: str = argument("show.png", "picture to write")
    num_images: int = argument(4, "images shown, a row each")
    first: int = argument(0, "number of the first of them, in the annotation file's order")
    epoch: int = argument(0, "whose augmentation is shown")

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_images", 1), ("first", 0), ("epoch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")


def show_data(args: ShowArguments) -> int:
    dataset, _ = load_data(args)
    total = len(dataset.annotations)
    indices = range(args.first, min(args.first + args.num_images, total))
    if not indices:
        raise UserError(f"--first {args.first}: there are {total} images, from 0 on")
    picture = show(dataset, indices, args.epoch)
    try:
        picture.save(args.output)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"written to {args.output}")
    return 0


@dataclass
class ShardArguments(TrainArguments):
    output: str | None = argument(None, "folder for the shards")
    shard_mb: float = argument(512, "megabytes of a shard")

    def __post_init__(self):
        super().__post_init__()
        if self.output is None:
            raise ValueError("--output: missing (the folder for the shards)")
        if not self.shard_mb > 0:
            raise ValueError(f"--shard_mb {self.shard_mb}: must be above 0")


def shard_data(args: ShardArguments) -> int:
    train, _ = find_splits(args)
    try:
        written = write_shards(load_annotations(train, None, args.follow_links), Path(args.output), args.shard_mb)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written to ({error.strerror})") from None
    print(
        f"{written['images']} images in {written['shards']} shards; "
        f"train.py reads them with --train_shards {args.output}"
    )
    return 0


def convert_parser(program: str = "pix2seq convert") -> argparse.ArgumentParser:
    """The arguments of `pix2seq convert`."""
    parser = LineErrorParser(prog=program, description="Convert YOLO or Pascal VOC to COCO annotation files.")
    parser.add_argument("source", type=Path, help="folder with data.yaml, or with Pascal VOC's XML files")
    parser.add_argument("output", type=Path, help="folder for the COCO annotation files and links to the images")
    parser.add_argument(
        "--follow_links", action="store_true", help="also open files outside the folder, behind links or in lists"
    )
    return parser


def convert_data(args: argparse.Namespace) -> int:
    flags, parts = [], convert(args.source, args.output, args.follow_links, lambda line: print(f"note: {line}"))
    for part in parts:
        print(f"{part.name}: {part.num_images} images, {part.num_objects} objects -> {part.json}")
        if part.name in ("train", "val"):
            flags += [f"--{part.name}_images", str(part.images), f"--{part.name}_json", str(part.json)]
    if {"train", "val"} <= {part.name for part in parts if part.linked}:
        flags = ["--root", str(args.output)]
    if flags:
        print(f"train.py reads them with {shlex.join(flags)}")
    names = {part.name for part in parts}
    if len(names & {"train", "val"}) == 1:
        missing = "val" if "train" in names else "train"
        print(f"there are no {missing} images: train.py needs --{missing}_images and --{missing}_json too")
    return 0


def check_main(argv: list[str] | None = None, program: str = "pix2seq check") -> int:
    """Parses the command line and checks a dataset; returns the exit code."""
    return run_command(check_data, parse(TrainArguments, argv, program), program=program)


def show_main(argv: list[str] | None = None, program: str = "pix2seq show") -> int:
    """Parses the command line and draws training examples; returns the exit code."""
    return run_command(show_data, parse(ShowArguments, argv, program), program=program)


def shard_main(argv: list[str] | None = None, program: str = "pix2seq shard") -> int:
    """Parses the command line and writes shards; returns the exit code."""
    return run_command(shard_data, parse(ShardArguments, argv, program), program=program)


def convert_main(argv: list[str] | None = None, program: str = "pix2seq convert") -> int:
    """Parses the command line and converts a dataset; returns the exit code."""
    return run_command(convert_data, convert_parser(program).parse_args(argv), program=program)
