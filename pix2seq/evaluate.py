"""Evaluates a model, or any COCO results file, with the COCO metrics.

    python evaluate.py --checkpoint OUT/best --root DIR --output_dir E          a trained model
    python evaluate.py --predictions p.json --gt instances.json --output_dir E  any COCO results file
    python evaluate.py --oracle --root DIR                                      the AP of a perfect model

With --report, the output folder also holds a page with figures and examples of errors. `pix2seq compare A B` compares
two output folders. Under `accelerate launch`, the images are divided among the processes and each is counted once.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import parse, read_training_arguments, run_command
from pix2seq.arguments import DecodingArguments, argument, check_at_least
from pix2seq.cpu_memory import reuse_freed_memory
from pix2seq.data import Annotations, Categories, EvalDataset, find_split, load_annotations
from pix2seq.data.issues import count_by_kind
from pix2seq.errors import UserError
from pix2seq.evaluation import oracle_predictions, predict, prediction_image, warn_unreadable
from pix2seq.evaluation.coco_metrics import coco_metrics, load_ground_truth, load_predictions, metrics_table
from pix2seq.evaluation.output_folder import Skipped, output_files, write_results
from pix2seq.evaluation.report.write import write_report
from pix2seq.models import load_model
from pix2seq.output_paths import check_no_input, prepare_output_folder, report_write_errors
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
        False, "also write report.html: AP by class and size, types of errors, examples; needs --output_dir"
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


@dataclass
class EvaluationData:
    """The ground truth and the predictions of an evaluation.

    Args:
        name: Name of the predictions in error messages.
        title: Title of the report.
        annotation_file: File of the ground truth.
        ground_truth: COCO annotations from `load_ground_truth`.
        predictions: COCO results.
        annotations: Gives access to the images, None if only a results file is evaluated.
        skipped: Unreadable images and issues in the annotation file.
    """

    name: str
    title: str
    annotation_file: str
    ground_truth: dict
    predictions: list[dict]
    annotations: Annotations | None = None
    skipped: Skipped = field(default_factory=Skipped)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def run_evaluation(args: EvaluateArguments) -> dict[str, float]:
    """Evaluates; the main process prints the metrics and writes the output folder.

    Returns:
        The metrics, on every process.

    Raises:
        UserError: An argument or a file is invalid.
    """
    output = None if args.output_dir is None else Path(args.output_dir)
    if output is not None:
        prepare_output_folder(output)
    if args.checkpoint is not None:
        data = evaluate_checkpoint(args, args.checkpoint)
    elif args.oracle:
        data = evaluate_oracle(args)
    else:
        assert args.predictions is not None
        assert args.gt is not None
        check_inputs(args, [Path(args.predictions), Path(args.gt)])
        data = read_results_file(args.predictions, args.gt)
    metrics = coco_metrics(data.ground_truth, data.predictions, data.name)
    if args.predictions is not None:
        image_ids = {image["id"] for image in data.ground_truth["images"]}
        data.skipped.num_without_predictions = len(image_ids - {entry["image_id"] for entry in data.predictions})
    if is_main_process():
        print(metrics_table(metrics))
        if count := data.skipped.num_without_predictions:
            total = len(data.ground_truth["images"])
            print(f"{count} of {total} images have no prediction in {data.name}; their objects count as missed")
        warn_unreadable(data.skipped.unreadable)
        if data.skipped.issues:
            print(f"issues in {data.annotation_file}: {count_by_kind(data.skipped.issues)}")
        if output is not None:
            with report_write_errors(output):
                write_output(args, output, metrics, data)
    return metrics


def check_inputs(args: EvaluateArguments, inputs: Iterable[Path]) -> None:
    """Checks that the files of --output_dir are none of the inputs. Raises UserError."""
    if args.output_dir is not None:
        check_no_input(output_files(Path(args.output_dir)), inputs, f"--output_dir {args.output_dir}")


def read_results_file(predictions: str, annotation_file: str) -> EvaluationData:
    """Reads the predictions of a COCO results file."""
    skipped = Skipped()
    return EvaluationData(
        name=f"--predictions {predictions}",
        title="/".join(Path(predictions).resolve().parts[-2:]),
        annotation_file=annotation_file,
        ground_truth=load_ground_truth(annotation_file, warn=skipped.issues.extend),
        predictions=load_predictions(predictions),
        skipped=skipped,
    )


def evaluate_oracle(args: EvaluateArguments) -> EvaluationData:
    """Computes the predictions of a perfect model."""
    dataset = load_dataset(args, training={}, categories=None, image_size=args.image_size)
    annotations, skipped = dataset.annotations, skipped_annotations(dataset.annotations)
    tokenizer = Tokenizer(len(annotations.categories.ids), args.num_bins)
    return EvaluationData(
        name="predictions",
        title="the oracle",
        annotation_file=str(annotations.split.json),
        ground_truth=load_ground_truth(annotations.split.json),
        predictions=oracle_predictions(dataset, tokenizer, warn=skipped.unreadable.extend),
        annotations=annotations,
        skipped=skipped,
    )


def evaluate_checkpoint(args: EvaluateArguments, checkpoint: str) -> EvaluationData:
    """Runs a model over a dataset."""
    transformers_logging.disable_progress_bar()
    model = load_model(checkpoint, "--checkpoint")
    training = read_training_arguments(checkpoint, "--checkpoint")
    accelerator = Accelerator(
        # Without `cpu`, several processes on a CPU do not form a group. Apple's GPUs lack float64.
        cpu=not torch.cuda.is_available(),
        mixed_precision=args.mixed_precision or training.get("mixed_precision"),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: needs a GPU; use bf16 or no")
    if accelerator.device.type == "cpu":
        reuse_freed_memory()
    config = model.to(accelerator.device).config
    categories = Categories(tuple(config.category_ids), config.class_names)
    dataset = load_dataset(args, training, categories, config.image_size)
    annotations, skipped = dataset.annotations, skipped_annotations(dataset.annotations)
    try:
        options = model.override_options(**args.decoding())
    except ValueError as error:
        raise UserError(f"--{error}") from None
    return EvaluationData(
        name="predictions",
        title="/".join(Path(checkpoint).resolve().parts[-2:]),
        annotation_file=str(annotations.split.json),
        ground_truth=load_ground_truth(annotations.split.json, annotations.image_ids, categories),
        predictions=predict(
            model,
            dataset,
            options,
            args.eval_batch_size or training.get("eval_batch_size", 64),
            accelerator,
            args.num_workers,
            warn=skipped.unreadable.extend,
        ),
        annotations=annotations,
        skipped=skipped,
    )


def load_dataset(
    args: EvaluateArguments, training: dict, categories: Categories | None, image_size: int
) -> EvalDataset[Annotations]:
    """Loads the images that the command line names, otherwise those that were evaluated in training.

    Args:
        args: The arguments.
        training: Arguments of the training run, {} if unknown.
        categories: Classes of the model. Default: those in the annotation file.
        image_size: Side of the padded square images in pixels.
    """
    overfit = training.get("overfit", 0) if args.val_json is None else 0
    name = "train" if overfit else "val"
    source = vars(args) if args.root or args.val_json else training
    locations = {"root": source.get("root")}
    locations |= {key: source.get(f"{name}_{key}") for key in ("images", "json", "shards")}
    if not any(locations.values()):
        raise UserError("--root: missing (the folder of a COCO-layout dataset)")
    follow_links = args.follow_links or training.get("follow_links", False)
    annotations = load_annotations(find_split(name, **locations), categories, follow_links)
    check_inputs(args, annotations.input_files())
    if overfit:
        annotations = annotations.subset(range(min(overfit, len(annotations))))
        if is_main_process():
            print(f"the first {len(annotations)} training images, as in training (--overfit {overfit})")
    return EvalDataset(annotations, EvalTransform(image_size))


def skipped_annotations(annotations: Annotations) -> Skipped:
    """Returns the issues in the annotation file. Images that cannot be read are added when they are evaluated."""
    return Skipped(issues=[issue for issue in annotations.issues if issue.file == str(annotations.split.json)])


def write_output(args: EvaluateArguments, output: Path, metrics: dict, data: EvaluationData) -> None:
    """Writes the output folder and prints the names of the files."""
    annotations, skipped = data.annotations, data.skipped
    if annotations is not None:  # the files name no folder of this machine, so that they can be sent to others
        skipped.unreadable = [line.removeprefix(f"{annotations.split.images}/") for line in skipped.unreadable]
    write_results(output, metrics, data.ground_truth, data.predictions, data.annotation_file, skipped)
    names = ["metrics.json", "predictions.json"]
    if annotations is not None and args.num_images > 0:
        prediction_image(annotations, data.predictions, args.num_images).save(output / "predictions.png")
        names.append("predictions.png")
    if args.report:
        write_report(
            output,
            data.ground_truth,
            data.predictions,
            annotations,
            name=data.name,
            title=data.title,
            notes=skipped.lines(),
        )
        names.append("report.html")
    print(f"written to {output}: {', '.join(names)}")


def evaluate(args: EvaluateArguments) -> int:
    """Calls `run_evaluation` and returns the exit code. Only the main process raises a `UserError`."""
    try:
        run_evaluation(args)
    except UserError:
        if is_main_process():
            raise
        return 2
    return 0


def main(argv: list[str] | None = None, program: str = "evaluate.py") -> int:
    """Parses the command line and evaluates; returns the exit code."""
    return run_command(evaluate, parse(EvaluateArguments, argv, program), program=program)
