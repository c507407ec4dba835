"""The evaluation command of `pix2seq`: compare."""

import argparse
import json
from dataclasses import asdict

from pix2seq.argument_parser import LineErrorParser, path, run_command
from pix2seq.data.coco import read_json
from pix2seq.data.issues import count_by_kind
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import check_predictions, load_ground_truth
from pix2seq.evaluation.compare import (
    MIN_IMAGES,
    MIN_RESAMPLES,
    Comparison,
    common_ground_truth,
    compare,
    comparison_table,
    summary_line,
)
from pix2seq.evaluation.output_folder import GROUND_TRUTH_FILE, read_ground_truth
from pix2seq.output_paths import check_output_file


def compare_parser(program: str = "pix2seq compare") -> argparse.ArgumentParser:
    """Returns the parser of `pix2seq compare`."""
    parser = LineErrorParser(prog=program, description="Compares two models on the same images.")
    parser.add_argument("a", type=path, help="output folder of evaluate.py, or a COCO results file")
    parser.add_argument("b", type=path, help="another, of the same images")
    parser.add_argument("--gt", type=path, help="COCO annotation file (default: the ground truth in the folders)")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: 0)")
    parser.add_argument("--output", type=path, help="JSON file to write the numbers to")
    return parser


def run_compare(args: argparse.Namespace) -> int:
    """Compares two models on the same images; returns the exit code."""
    for name, value, least in (("resamples", args.resamples, MIN_RESAMPLES), ("seed", args.seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    files = [path / "predictions.json" if path.is_dir() else path for path in (args.a, args.b)]
    if args.output is not None:
        ground_truths = [args.a / GROUND_TRUTH_FILE, args.b / GROUND_TRUTH_FILE] if args.gt is None else [args.gt]
        check_output_file(args.output, [*files, *ground_truths])
    ground_truth = find_ground_truth(args)
    if all(annotation["iscrowd"] for annotation in ground_truth["annotations"]):
        raise UserError(f"{args.a} and {args.b}: the images have no objects, so AP is not defined")
    predictions = {}
    for name, file in zip(("a", "b"), files, strict=True):
        predictions[name] = read_json(file, name=f"{name.upper()} {file}")
        check_predictions(predictions[name], ground_truth, f"{name.upper()} {file}")
    comparisons = compare(ground_truth, **predictions, resamples=args.resamples, seed=args.seed)
    num_images = len(ground_truth["images"])
    summary = summary_line(comparisons[0], num_images)
    resamples = f", {args.resamples} resamples" if num_images >= MIN_IMAGES else ""
    print(f"A: {args.a}\nB: {args.b}\n{num_images} images{resamples}\n")
    print(f"{comparison_table(comparisons)}\n\n{summary}")
    if args.output is not None:
        write_comparisons(args, comparisons, summary)
    return 0


def find_ground_truth(args: argparse.Namespace) -> dict:
    """Returns the ground truth of --gt, or the common one of both folders. Raises UserError."""
    if args.gt is not None:
        return load_ground_truth(args.gt, warn=lambda issues: print(f"issues in {args.gt}: {count_by_kind(issues)}"))
    known = [truth for truth in map(read_ground_truth, (args.a, args.b)) if truth is not None]
    if not known:
        raise UserError("--gt: missing (the COCO annotation file of the images; neither A nor B is a folder with one)")
    ground_truth, difference = common_ground_truth(known[0], known[-1])
    if ground_truth is None:
        raise UserError(
            f"{args.a} and {args.b}: were evaluated on different {difference}; name a common file with --gt"
        )
    return ground_truth


def write_comparisons(args: argparse.Namespace, comparisons: list[Comparison], summary: str) -> None:
    """Writes the comparisons as JSON. NaN becomes null. Raises UserError."""
    content = {
        "A": str(args.a),
        "B": str(args.b),
        "resamples": args.resamples,
        "seed": args.seed,
        "summary": summary,
        "metrics": [
            {key: None if value != value else value for key, value in asdict(comparison).items()}
            for comparison in comparisons
        ],
    }
    try:
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    print(f"written to {args.output}")


def compare_main(argv: list[str] | None = None, program: str = "pix2seq compare") -> int:
    """Parses the command line and compares two models; returns the exit code."""
    return run_command(run_compare, compare_parser(program).parse_args(argv), program=program)
