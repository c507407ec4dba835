"""Datasets from the command line: `python -m pix2seq.data COMMAND ...`

    check --root DIR              what is in it, and everything that is wrong with it
    show --root DIR               what the model will see, decoded back from its tokens
    convert DIR OUT               YOLO or Pascal VOC -> COCO's layout; the images stay where they are
    shard --root DIR --output OUT the training images packed into WebDataset shards

check, show and shard take the flags of train.py, recipes included. --help after a command lists its own.
"""

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pix2seq.assembly import find_splits, load_data
from pix2seq.command_line import parse
from pix2seq.config import Arguments, flag
from pix2seq.data.check import check
from pix2seq.data.coco import load_annotations
from pix2seq.data.convert import convert
from pix2seq.data.faults import ERROR
from pix2seq.data.shards import write_shards
from pix2seq.data.show import show
from pix2seq.errors import UserError


def check_data(args: Arguments) -> int:
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
class ShowArguments(Arguments):
    output: str = flag("show.png", "picture to write")
    num_images: int = flag(4, "images shown, a row each")
    first: int = flag(0, "number of the first of them, in the annotation file's order")
    epoch: int = flag(0, "whose augmentation is shown")

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
class ShardArguments(Arguments):
    output: str | None = flag(None, "folder for the shards")
    shard_mb: float = flag(512, "megabytes of a shard")

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def convert_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pix2seq.data convert", description="YOLO or Pascal VOC -> COCO's layout")
    parser.add_argument("source", type=Path, help="folder with data.yaml, or with Pascal VOC's XML files")
    parser.add_argument("output", type=Path, help="folder for the COCO annotation files, and links to the images")
    parser.add_argument(
        "--follow_links", action="store_true", help="also open what lies outside the folder: behind links, or in lists"
    )
    return parser


def convert_data(words: list[str]) -> int:
    args = convert_parser().parse_args(words)
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


COMMANDS = {
    "check": lambda words: check_data(parse(Arguments, words, "pix2seq.data check")),
    "show": lambda words: show_data(parse(ShowArguments, words, "pix2seq.data show")),
    "convert": convert_data,
    "shard": lambda words: shard_data(parse(ShardArguments, words, "pix2seq.data shard")),
}


def main(words: list[str]) -> int:
    """Runs a command; the exit code. A mistake of the user is told in one line."""
    if not words or words[0] not in COMMANDS:
        print(__doc__, file=sys.stdout if words in (["-h"], ["--help"]) else sys.stderr)
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        return COMMANDS[words[0]](words[1:])
    except UserError as error:
        print(f"pix2seq.data {words[0]}: error: {error}", file=sys.stderr)
        return 2
