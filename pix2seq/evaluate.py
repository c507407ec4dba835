"""Scores a detector, or anybody's predictions, with the 12 COCO numbers.

    python evaluate.py --checkpoint OUT/best --root DIR --output_dir E          a trained detector
    python evaluate.py --predictions p.json --gt instances.json --output_dir E  any COCO results file
    python evaluate.py --oracle --root DIR                                      the AP a perfect model would have

--report adds a page that shows what is right and what is wrong. `python -m pix2seq compare A B` says which
of two folders is better.

Under `accelerate launch` the images are shared between the processes and each is counted once.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, read_training_arguments, run_command
from pix2seq.arguments import DecodingArguments, argument, check_at_least
from pix2seq.data import Categories, EvalDataset, find_split, load_annotations
from pix2seq.data.issues import count_by_kind
from pix2seq.errors import UserError
from pix2seq.evaluation import oracle_predictions, predict, prediction_image, warn_unreadable
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth, load_predictions, metrics_table
from pix2seq.evaluation.output_folder import Skipped, prepare, write_numbers, writing
from pix2seq.evaluation.report.write import write_report
from pix2seq.models import load_model
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform


@dataclass
class EvaluateArguments(DecodingArguments):
    """Arguments of `evaluate.py`. Exactly one of checkpoint, predictions (with gt) and oracle is given."""

    _argument_group_name: ClassVar = "evaluation"

    checkpoint: str | None = argument(None, "folder of a trained model: OUT/best, OUT/final or a checkpoint")
    predictions: str | None = argument(None, "COCO results file to evaluate instead, with --gt")
    gt: str | None = argument(None, "COCO annotation file to evaluate --predictions against")
    oracle: bool = argument(
        False, "encode and decode the ground truth with the tokenizer: the AP of a perfect model with these bins"
    )
    root: str | None = argument(
        None, "COCO layout, of which the val split is evaluated (default: the dataset of the training run)"
    )
    val_images: str | None = argument(None, "folder of images, for any other layout")
    val_json: str | None = argument(None, "COCO annotation file of the images")
    follow_links: bool = argument(False, "open images that are symbolic links to files outside their folder")
    output_dir: str | None = argument(
        None, "folder for metrics.json, predictions.json, predictions.png and the report"
    )
    eval_batch_size: int | None = argument(None, "images per process (default: that of training)")
    num_workers: int = argument(2, "data loading workers")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = argument(None, "default: that of training")
    image_size: int = argument(640, "side of the square image of --oracle")
    num_bins: int = argument(1000, "coordinate bins of --oracle")
    num_images: int = argument(8, "images drawn in predictions.png")
    report: bool = argument(
        False, "also write report.html: AP by class, size and score, kinds of errors, examples; needs --output_dir"
    )

    def __post_init__(self):
        modes = [self.checkpoint is not None, self.predictions is not None, self.oracle]
        if sum(modes) != 1:
            raise ValueError("give exactly one of --checkpoint, --predictions (with --gt) and --oracle")
        if (self.predictions is None) != (self.gt is None):
            raise ValueError("--predictions and --gt go together")
        if (self.val_images is None) != (self.val_json is None):
            raise ValueError("--val_images and --val_json go together")
        if self.root is not None and self.val_json is not None:
            raise ValueError("--root and --val_json exclude each other: specify the dataset in one way")
        if self.oracle and self.root is None and self.val_json is None:
            raise ValueError("--oracle: --root (or --val_images and --val_json) is missing")
        if self.report and self.output_dir is None:
            raise ValueError("--report: needs --output_dir, the folder of report.html")
        check_at_least(self, 1, "eval_batch_size", "image_size")
        check_at_least(self, 2, "num_bins")
        check_at_least(self, 0, "num_workers", "num_images")
        super().__post_init__()


def dataset(args: EvaluateArguments, training: dict, categories: Categories | None, image_size: int) -> EvalDataset:
    """The images to evaluate: those named on the command line, else the ones training evaluated."""
    overfit = training.get("overfit", 0) if args.val_json is None else 0
    kind = "train" if overfit else "val"
    named = vars(args) if args.root or args.val_json else training
    where = [named.get(name) for name in ("root", f"{kind}_images", f"{kind}_json", f"{kind}_shards")]
    if not any(where):
        raise UserError("--root: missing (the folder of a COCO-layout dataset)")
    split = find_split(kind, *where)
    annotations = load_annotations(split, categories, args.follow_links or training.get("follow_links", False))
    if overfit:
        annotations = annotations.subset(range(min(overfit, len(annotations))))
        if os.environ.get("RANK", "0") == "0":
            print(f"the first {len(annotations)} training images, as in training (--overfit {overfit})")
    return EvalDataset(annotations, EvalTransform(image_size))


def detect(args: EvaluateArguments, skipped: Skipped) -> tuple[dict, list[dict], EvalDataset, bool]:
    """Ground truth, the detector's predictions, their images, and whether this is the main process. Adds to `skipped`
    the images that cannot be read."""
    transformers_logging.disable_progress_bar()
    model, training = (
        load_model(args.checkpoint, "--checkpoint"),
        read_training_arguments(args.checkpoint, "--checkpoint"),
    )
    accelerator = Accelerator(
        # Without it, processes on a CPU do not find each other. Apple's GPUs have no float64.
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision or training.get("mixed_precision"),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    config = model.to(accelerator.device).config
    categories = Categories(tuple(config.category_ids), config.class_names)
    data = dataset(args, training, categories, config.image_size)
    try:
        options = model.override_options(**args.decoding())
    except ValueError as error:
        raise UserError(f"--{error}") from None
    batch_size = args.eval_batch_size or training.get("eval_batch_size", 64)
    truth = load_ground_truth(data.annotations.split.json, data.annotations.image_ids, categories)
    warn = skipped.unreadable.extend
    predictions = predict(model, data, options, batch_size, accelerator, args.num_workers, warn=warn)
    return truth, predictions, data, accelerator.is_main_process


def run_evaluation(args: EvaluateArguments) -> dict:
    """Returns the metrics, on every process; writes and prints them on the main one."""
    output = Path(args.output_dir) if args.output_dir is not None else None
    if output is not None:
        prepare(output)
    name, data, is_main, skipped = "predictions", None, True, Skipped()
    if args.predictions is not None:
        name = f"--predictions {args.predictions}"
        truth = load_ground_truth(args.gt, warn=skipped.faults.extend)
        predictions = load_predictions(args.predictions)
    elif args.oracle:
        data = dataset(args, {}, None, args.image_size)
        tokenizer = Tokenizer(len(data.annotations.categories.ids), args.num_bins)
        truth = load_ground_truth(data.annotations.split.json)
        predictions = oracle_predictions(data, tokenizer, skipped.unreadable.extend)
    else:
        truth, predictions, data, is_main = detect(args, skipped)

    metrics = coco_metrics(truth, predictions, name)
    if not is_main:
        return metrics
    print(metrics_table(metrics))
    warn_unreadable(skipped.unreadable)
    ground_truth = args.gt if data is None else str(data.annotations.split.json)
    if data is not None:  # what is wrong with its images has been told
        skipped.faults = [fault for fault in data.annotations.issues if fault.file == ground_truth]
    if skipped.faults:
        print(f"faults in {ground_truth}: {count_by_kind(skipped.faults)}")
    if output is not None:
        with writing(output):
            write(args, output, metrics, truth, predictions, data, ground_truth, skipped)
    return metrics


def write(
    args: EvaluateArguments,
    output: Path,
    metrics: dict,
    truth: dict,
    predictions: list,
    data: EvalDataset | None,
    ground_truth: str,
    skipped: Skipped,
) -> None:
    annotations = None if data is None else data.annotations
    if annotations is not None:  # names are enough: pages and files are sent to others
        skipped.unreadable = [line.removeprefix(f"{annotations.split.images}/") for line in skipped.unreadable]
    write_numbers(output, metrics, truth, predictions, ground_truth, skipped)
    written = ["metrics.json", "predictions.json"]
    if annotations is not None and args.num_images > 0:
        prediction_image(annotations, predictions, args.num_images).save(output / "predictions.png")
        written.append("predictions.png")
    if args.report:
        named = Path(args.checkpoint or args.predictions or "").resolve()
        title = "the oracle" if args.oracle else "/".join(named.parts[-2:])
        write_report(output, truth, predictions, annotations, "predictions", title, skipped)
        written.append("report.html")
    print(f"written to {output}: {', '.join(written)}")


def evaluate(args: EvaluateArguments) -> int:
    """Calls `run_evaluation`; returns the exit code. Only the main process reports a `UserError`."""
    try:
        run_evaluation(args)
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        return 2
    return 0


def main(argv: list[str] | None = None, program: str = "evaluate.py") -> int:
    """Parses the command line and evaluates; returns the exit code."""
    return run_command(evaluate, parse(EvaluateArguments, argv, program), program=program)
