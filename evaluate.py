"""Scores a detector, or anybody's predictions, with the 12 COCO numbers.

    python evaluate.py --checkpoint OUT/best --root DIR --output_dir E          a trained detector
    python evaluate.py --predictions p.json --gt instances.json --output_dir E  any COCO results file
    python evaluate.py --oracle --root DIR                                      the AP a perfect model would have

--report adds a page that shows what is right and what is wrong. `python -m pix2seq.evaluation compare A B` says which
of two folders is better.

Under `accelerate launch` the images are shared between the processes and each is counted once.
"""

import json
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
from pix2seq.evaluation import oracle_predictions, predict, prediction_picture
from pix2seq.evaluation.provenance import write_provenance
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


def detect(args: EvaluateArguments) -> tuple[dict, list[dict], EvalDataset, bool]:
    """Ground truth, the detector's predictions, their images, and whether this is the main process."""
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
    batch_size = args.eval_batch_size or training.get("eval_batch_size", 32)
    predictions = predict(model, data, options, batch_size, accelerator, args.num_workers)
    truth = load_ground_truth(data.annotations.split.json, data.annotations.image_ids, categories)
    return truth, predictions, data, accelerator.is_main_process


def main(args: EvaluateArguments) -> dict:
    """Returns the metrics, on every process; writes and prints them on the main one."""
    output = Path(args.output_dir) if args.output_dir else None
    try:
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output}: cannot be made ({error.strerror})") from None
    name, data, is_main = "predictions", None, True
    if args.predictions is not None:
        name = f"--predictions {args.predictions}"
        truth, predictions = load_ground_truth(args.gt, warn=print), load_predictions(args.predictions)
    elif args.oracle:
        data = dataset(args, {}, None, args.image_size)
        tokenizer = Tokenizer(len(data.annotations.categories.ids), args.num_bins)
        truth, predictions = load_ground_truth(data.annotations.split.json), oracle_predictions(data, tokenizer)
    else:
        truth, predictions, data, is_main = detect(args)

    metrics = coco_metrics(truth, predictions, name)
    if not is_main:
        return metrics
    print(metrics_table(metrics))
    if data is not None and data.annotations.faults:
        print(f"faults in {data.annotations.split.json}: {tally(data.annotations.faults)}")
    if output is not None:
        write(args, output, metrics, truth, predictions, data)
    return metrics


def write(
    args: EvaluateArguments, output: Path, metrics: dict, truth: dict, predictions: list, data: EvalDataset | None
) -> None:
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (output / "predictions.json").write_text(json.dumps(predictions))
    annotations = None if data is None else data.annotations
    if annotations is None:
        write_provenance(output, args.gt)
    else:
        write_provenance(output, annotations.split.json, annotations.image_ids, annotations.categories)
    written = ["metrics.json", "predictions.json"]
    if annotations is not None and args.num_pictures > 0:
        prediction_picture(annotations, predictions, args.num_pictures).save(output / "predictions.png")
        written.append("predictions.png")
    if args.report:
        title = "the oracle" if args.oracle else args.checkpoint or args.predictions
        write_report(output, truth, predictions, annotations, "predictions", title)
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
