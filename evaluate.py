"""Scores a detector, or anybody's predictions, with the 12 COCO numbers.

    python evaluate.py --checkpoint OUT/best --root DIR --output_dir E          a trained detector
    python evaluate.py --predictions p.json --gt instances.json --output_dir E  any COCO results file
    python evaluate.py --oracle --root DIR                                      the AP a perfect model would have

--report adds a page that shows what is right and what is wrong. `python -m pix2seq.evaluation compare A B` says which
of two folders is better.

Under `accelerate launch` the images are shared between the processes and each is counted once.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from pix2seq.command_line import parse, read_flags
from pix2seq.config import EvaluateArguments
from pix2seq.data import Categories, EvalDataset, find_split, load_annotations
from pix2seq.data.faults import tally
from pix2seq.errors import UserError
from pix2seq.evaluation import oracle_predictions, predict, prediction_picture, warn_of_unreadable
from pix2seq.evaluation.output_folder import Skipped, prepare, write_numbers, writing
from pix2seq.evaluation.report import write_report
from pix2seq.model import load_detector
from pix2seq.scoring import coco_metrics, load_ground_truth, load_predictions, metrics_table
from pix2seq.tokenizer import Tokenizer
from pix2seq.transforms import EvalTransform


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
    model, training = load_detector(args.checkpoint, "--checkpoint"), read_flags(args.checkpoint, "--checkpoint")
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
        options = model.options_with(**args.decoding())
    except ValueError as error:
        raise UserError(f"--{error}") from None
    batch_size = args.eval_batch_size or training.get("eval_batch_size", 64)
    truth = load_ground_truth(data.annotations.split.json, data.annotations.image_ids, categories)
    warn = skipped.unreadable.extend
    predictions = predict(model, data, options, batch_size, accelerator, args.num_workers, warn=warn)
    return truth, predictions, data, accelerator.is_main_process


def main(args: EvaluateArguments) -> dict:
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
    warn_of_unreadable(skipped.unreadable)
    ground_truth = args.gt if data is None else str(data.annotations.split.json)
    if data is not None:  # what is wrong with its images has been told
        skipped.faults = [fault for fault in data.annotations.faults if fault.file == ground_truth]
    if skipped.faults:
        print(f"faults in {ground_truth}: {tally(skipped.faults)}")
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
    if annotations is not None and args.num_pictures > 0:
        prediction_picture(annotations, predictions, args.num_pictures).save(output / "predictions.png")
        written.append("predictions.png")
    if args.report:
        named = Path(args.checkpoint or args.predictions or "").resolve()
        title = "the oracle" if args.oracle else "/".join(named.parts[-2:])
        write_report(output, truth, predictions, annotations, "predictions", title, skipped)
        written.append("report.html")
    print(f"written to {output}: {', '.join(written)}")


def run(args: EvaluateArguments) -> int:
    """`main` with mistakes of the user turned into one line and exit code 2."""
    try:
        main(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks find the same fault
            print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(parse(EvaluateArguments)))
