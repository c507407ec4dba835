"""The evaluation commands of `pix2seq`: compare and tokens."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image
from transformers.utils import logging as transformers_logging

from pix2seq.argument_parser import LineErrorParser, run_command
from pix2seq.data.coco import read_json
from pix2seq.data.image_files import BadImageError, open_file
from pix2seq.data.issues import count_by_kind
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import check_predictions, load_ground_truth
from pix2seq.evaluation.compare import FEWEST_RESAMPLES, common_truth, compare, summary_line, table
from pix2seq.evaluation.output_folder import read_truth
from pix2seq.evaluation.token_figure import token_figure, trace_object
from pix2seq.models import load_model
from pix2seq.transforms import EvalTransform


def compare_parser(program: str = "pix2seq compare") -> argparse.ArgumentParser:
    parser = LineErrorParser(prog=program, description="Which of two detectors is better?")
    parser.add_argument("a", type=Path, help="output folder of evaluate.py, or a COCO results file")
    parser.add_argument("b", type=Path, help="another, of the same images")
    parser.add_argument("--gt", type=Path, help="COCO annotation file (default: what A and B were scored against)")
    parser.add_argument("--resamples", type=int, default=1000, help="resamples of the images (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="decides which images are drawn (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file to write the numbers to")
    return parser


def run_compare(args: argparse.Namespace) -> int:
    """Compares two models on the same images; returns the exit code."""
    for name, value, least in (("resamples", args.resamples, FEWEST_RESAMPLES), ("seed", args.seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if args.output is not None:
        _check_output(args.output, args.a, args.b, args.gt)
    truth = _ground_truth(args)
    if not any(not entry["iscrowd"] for entry in truth["annotations"]):
        raise UserError(f"{args.a} and {args.b}: there is no object to find in these images, so no AP to compare")
    results = []
    for letter, path in (("A", args.a), ("B", args.b)):
        file = path / "predictions.json" if path.is_dir() else path
        results.append(read_json(file, name=f"{letter} {file}"))
        check_predictions(results[-1], truth, f"{letter} {file}")
    rows = compare(truth, *results, args.resamples, args.seed)
    print(f"A: {args.a}\nB: {args.b}\n{len(truth['images'])} images, {args.resamples} resamples of them\n")
    sentence = summary_line(rows[0], len(truth["images"]))
    print(f"{table(rows)}\n\n{sentence}")
    if args.output is not None:
        _write(args.output, rows, sentence, args)
    return 0


def _check_output(path: Path, *inputs: Path | None) -> None:
    """Sees that a file can be written, and is none of the inputs, before the work. Raises UserError."""
    try:
        if path.exists() and any(other is not None and other.exists() and path.samefile(other) for other in inputs):
            raise UserError(f"--output {path}: would take the place of an input; name another file")
        target = path.resolve()  # of a link that leads to nothing yet, the link stays
        new = not target.exists()
        target.open("ab").close()
        if new:
            target.unlink()
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None


def _ground_truth(args) -> dict:
    """What both were scored against, which must be the same, or --gt. Raises UserError."""
    if args.gt is not None:
        return load_ground_truth(args.gt, warn=lambda faults: print(f"faults in {args.gt}: {count_by_kind(faults)}"))
    known = [truth for truth in map(read_truth, (args.a, args.b)) if truth is not None]
    if not known:
        raise UserError("--gt: missing (the COCO annotation file of the images; neither A nor B tells which)")
    truth, what = common_truth(known[0], known[-1])
    if truth is None:
        raise UserError(f"{args.a} and {args.b}: were scored against different {what}; name what is common with --gt")
    return truth


def _write(path: Path, rows, sentence: str, args) -> None:
    content = {
        "A": str(args.a),
        "B": str(args.b),
        "resamples": args.resamples,
        "seed": args.seed,
        "verdict": sentence,
        "rows": [{key: None if value != value else value for key, value in asdict(row).items()} for row in rows],
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from None
    print(f"written to {path}")


def tokens_parser(program: str = "pix2seq tokens") -> argparse.ArgumentParser:
    parser = LineErrorParser(prog=program, description="How was an object written, token by token?")
    parser.add_argument("--checkpoint", required=True, help="OUT/best, OUT/final, a checkpoint folder, or a hub name")
    parser.add_argument("--image", type=Path, required=True, help="file of a picture")
    parser.add_argument("--object", type=int, help="which of the objects written, from 1 (default: of highest score)")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to draw to")
    return parser


def run_tokens(args: argparse.Namespace) -> int:
    """Draws how an object was decoded; returns the exit code."""
    try:
        pixels = open_file(args.image).pixels()
    except BadImageError as error:
        raise UserError(f"--image {args.image}: cannot be read ({error})") from None
    if args.output.suffix.lower() not in ("", ".png"):
        raise UserError(f"--output {args.output}: must end in .png, as which it is written")
    _check_output(args.output, args.image)
    transformers_logging.disable_progress_bar()
    model = load_model(args.checkpoint, "--checkpoint").eval()
    canvas = EvalTransform(model.config.image_size)(pixels)
    written = trace_object(model, canvas.image[None], args.object)
    picture = token_figure(written, to_pil_image(canvas.image), model.tokenizer, model.config.class_names)
    try:
        picture.save(args.output, "PNG")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written ({error.strerror})") from None
    print(f"object {written.number} of {written.count}, score {written.score:.3f}, drawn to {args.output}")
    return 0


def compare_main(argv: list[str] | None = None, program: str = "pix2seq compare") -> int:
    """Parses the command line and compares two models; returns the exit code."""
    return run_command(run_compare, compare_parser(program).parse_args(argv), program=program)


def tokens_main(argv: list[str] | None = None, program: str = "pix2seq tokens") -> int:
    """Parses the command line and draws how an object was decoded; returns the exit code."""
    return run_command(run_tokens, tokens_parser(program).parse_args(argv), program=program)
