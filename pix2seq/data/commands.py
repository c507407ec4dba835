"""The dataset commands of `pix2seq`: check, show, convert and shard.

check, show and shard accept the arguments and recipes of training.
"""

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from pix2seq.argument_parser import LineErrorParser, parse, path, run_command
from pix2seq.arguments import TrainArguments, argument, check_value
from pix2seq.data.check import REPORT_FILES, check_dataset
from pix2seq.data.coco import load_annotations
from pix2seq.data.convert import convert
from pix2seq.data.issues import ERROR, count_by_kind
from pix2seq.data.layouts import Split
from pix2seq.data.shards import write_shards
from pix2seq.data.show import draw_training_examples
from pix2seq.errors import UserError
from pix2seq.output_paths import check_no_input, check_output_file, prepare_output_folder, report_write_errors
from pix2seq.training.datasets import find_splits, load_data


def check_data(args: TrainArguments) -> int:
    """Prints the dataset report and saves it in the run folder. Returns 2 if there are errors, otherwise 0."""
    train, val = find_splits(args)
    output = Path(args.output_dir)
    folder = output / "data"
    for needed in (output, folder):
        prepare_output_folder(needed)
    files = [folder / name for name in REPORT_FILES]
    splits = [split for split in (train, val) if split is not None]
    inputs = [split.json for split in splits] + [split.images / file.name for split in splits for file in files]
    check_no_input(files, inputs, f"--output_dir {args.output_dir}")
    report = check_dataset(
        train,
        val,
        follow_links=args.follow_links,
        max_objects=args.max_objects,
        num_workers=min(args.num_workers, os.cpu_count() or 1),
    )
    print(report)
    with report_write_errors(output):
        report.save(folder)
    print(f"saved in {folder}: check.json" + (", check.png" if report.draw_figure is not None else ""))
    return 2 if report.with_severity(ERROR) else 0


@dataclass
class ShowArguments(TrainArguments):
    """Arguments of `pix2seq show`: those of training, and what to draw."""

    output: str = argument("show.png", "image file to write")
    num_images: int = argument(4, "number of images, one in each row")
    first: int = argument(0, "index of the first image in the annotation file")
    epoch: int = argument(0, "epoch of the augmentation")

    def __post_init__(self):
        super().__post_init__()
        for name, minimum in (("num_images", 1), ("first", 0), ("epoch", 0)):
            check_value(self, name, getattr(self, name) >= minimum, f"at least {minimum}")


def show_data(args: ShowArguments) -> int:
    """Draws training examples. Returns the exit code."""
    output = Path(args.output)
    check_output_file(output)
    dataset, val_set = load_data(args)
    inputs = [*dataset.annotations.input_files(), *val_set.annotations.input_files()]
    check_output_file(output, [*inputs, *([Path(args.config)] if args.config else [])])
    total = len(dataset.annotations)
    indices = range(args.first, min(args.first + args.num_images, total))
    if not indices:
        raise UserError(f"--first {args.first}: must be less than {total}, the number of training images")
    image = draw_training_examples(dataset, indices, args.epoch)
    try:
        image.save(output)
    except (OSError, ValueError) as error:
        raise UserError(f"--output {args.output}: cannot be written ({error})") from None
    print(f"saved as {args.output}")
    return 0


@dataclass
class ShardArguments(TrainArguments):
    """Arguments of `pix2seq shard`: those of training, and where to write."""

    output: str = argument(None, "folder for the shards")
    shard_mb: float = argument(512, "approximate size of a shard in megabytes")

    def __post_init__(self):
        super().__post_init__()
        if self.output is None:
            raise ValueError("--output: missing; name a folder for the shards")
        check_value(self, "shard_mb", self.shard_mb > 0, "above 0")


def shard_data(args: ShardArguments) -> int:
    """Packs the training images into shards. Returns the exit code."""
    train, _ = find_splits(args)
    try:
        counts = write_shards(load_annotations(train, None, args.follow_links), Path(args.output), args.shard_mb)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written to ({error.strerror})") from None
    print(f"{counts['images']} images in {counts['shards']} shards; train with --train_shards {args.output}")
    return 0


def convert_parser(program: str = "pix2seq convert") -> argparse.ArgumentParser:
    """Builds the parser of `pix2seq convert`."""
    parser = LineErrorParser(prog=program, description="Convert YOLO or Pascal VOC to COCO annotation files.")
    parser.add_argument("source", type=path, help="folder with data.yaml, or with the XML files of Pascal VOC")
    parser.add_argument("output", type=path, help="folder for the COCO annotation files and links to the images")
    parser.add_argument(
        "--follow_links", action="store_true", help="also open files outside the source, behind links or in lists"
    )
    return parser


def convert_data(args: argparse.Namespace) -> int:
    """Converts a dataset and prints the flags to train on it. Returns the exit code."""
    splits = convert(args.source, args.output, args.follow_links, notify=lambda message: print(f"note: {message}"))
    flags: list[str] = []
    for split in splits:
        print(f"{split.name}: {split.num_images} images, {split.num_objects} objects -> {split.json}")
        if issues := load_annotations(Split(split.images, split.json), follow_links=args.follow_links).issues:
            print(f"note: {count_by_kind(issues)} (`pix2seq check` lists them), the first is {issues[0]}")
        if split.name in ("train", "val"):
            flags += [f"--{split.name}_images", str(split.images), f"--{split.name}_json", str(split.json)]
    if {"train", "val"} <= {split.name for split in splits if split.linked}:
        flags = ["--root", str(args.output)]
    if flags:
        print(f"train with {shlex.join(flags)}")
    missing = {"train", "val"} - {split.name for split in splits}
    if len(missing) == 1:
        (name,) = missing
        print(f"the {name} split is missing: training also needs --{name}_images and --{name}_json")
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
