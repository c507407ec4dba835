"""Writes a report: report.html, report.json and the figures."""

import json
from pathlib import Path

from PIL import Image

from pix2seq.data import Annotations
from pix2seq.evaluation.report import captions
from pix2seq.evaluation.report.analysis import Analysis, analyze
from pix2seq.evaluation.report.examples import MIN_SCORE, example_images
from pix2seq.evaluation.report.figures import draw_figures, threshold_text
from pix2seq.evaluation.report.html import Section, bullet_list, figure, page, paragraph, table
from pix2seq.evaluation.report.matching import ERROR_TYPES

MAX_PAIRS = 10  # of confused classes


def write_report(
    folder: Path,
    ground_truth: dict,
    predictions: list[dict],
    annotations: Annotations | None = None,
    name: str = "predictions",
    title: str = "predictions",
    notes: list[str] | None = None,
) -> None:
    """Writes report.html, report.json and report/*.png.

    Args:
        folder: The output folder.
        ground_truth: COCO annotations from `load_ground_truth`.
        predictions: Entries of a COCO results file.
        annotations: Gives access to the images. Without them there are no examples of errors.
        name: Name of the predictions in error messages.
        title: What the report evaluates.
        notes: Further lines of the summary.

    Raises:
        UserError: Some predictions are invalid.
        OSError: A file cannot be written.
    """
    analysis = analyze(ground_truth, predictions, name)
    images = draw_figures(analysis)
    examples = {} if annotations is None else example_images(analysis, annotations)
    sections = [
        Section("summary", "Summary", [bullet_list(_summary(analysis.numbers) + (notes or []))]),
        Section("metrics", "COCO metrics", [_metrics_table(analysis.numbers)]),
        *_figure_sections(analysis, images),
        Section("examples", "Examples of errors", _examples(examples, annotations)),
    ]
    text = page(f"Evaluation of {title}", _dataset_line(analysis.numbers), sections, captions.FOOTER)
    (folder / "report").mkdir(exist_ok=True)
    for key, image in (images | {f"example_{key}": image for key, image in examples.items()}).items():
        image.save(folder / "report" / f"{key}.png")
    (folder / "report.json").write_text(json.dumps(analysis.numbers, indent=1) + "\n")
    (folder / "report.html").write_text(text, encoding="utf-8")


def _dataset_line(numbers: dict) -> str:
    crowds = f" and {numbers['crowds']:,} crowds" if numbers["crowds"] else ""
    return (
        f"{numbers['images']:,} images, {numbers['objects']:,} objects{crowds}, {len(numbers['classes'])} classes, "
        f"{numbers['predictions']:,} predictions"
    )


def _summary(numbers: dict) -> list[str]:
    metrics, threshold = numbers["metrics"], numbers["best_threshold"]
    if metrics["AP"] is None:
        return [captions.NO_OBJECTS]
    lines = [f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}, AP75 {metrics['AP75']:.3f}"]
    if threshold is None:
        lines.append("No prediction is correct at IoU 0.5.")
    else:
        lines.append(
            f"With score threshold {threshold_text(threshold['score'])}, {threshold['recall']:.0%} of the objects are "
            f"found and {threshold['precision']:.0%} of the predictions are correct (IoU 0.5)."
        )
    worst = max(numbers["errors"], key=lambda row: row["AP50_gain"])
    if worst["AP50_gain"] > 0:
        lines.append(f"Most costly type of error: {worst['type']}. Without it, AP50 gains {worst['AP50_gain']:.3f}.")
    ranked = sorted((row for row in numbers["classes"] if row["AP"] is not None), key=lambda row: row["AP"])
    if len(ranked) > 1:
        low, high = ranked[0], ranked[-1]
        lines.append(f"Lowest AP: {low['name']} ({low['AP']:.3f}). Highest AP: {high['name']} ({high['AP']:.3f}).")
    if numbers["calibration"] is not None:
        lines.append(f"Expected calibration error of the scores: {numbers['calibration']['ECE']:.3f}")
    return lines


def _figure_sections(analysis: Analysis, images: dict[str, Image.Image]) -> list[Section]:
    numbers, threshold = analysis.numbers, analysis.numbers["best_threshold"]
    at_threshold = captions.NO_THRESHOLD
    if threshold is not None:
        at_threshold = captions.THRESHOLD.format(**threshold | {"score": threshold_text(threshold["score"], 3)})
    blocks = {
        "classes": ("Classes", [_class_table(numbers)]),
        "precision_recall": ("Precision and recall", []),
        "sizes": ("Object size and number", []),
        "errors": ("Types of errors", [_error_table(numbers)]),
        "confusion": ("Confusion matrix", [paragraph(at_threshold), _confused_pairs(numbers)]),
        "calibration": ("Calibration", []),
    }
    return [
        Section(key, title, [figure(images[key], *captions.FIGURE_TEXTS[key]), *further])
        for key, (title, further) in blocks.items()
        if key in images
    ]


def _metrics_table(numbers: dict) -> str:
    rows = [(name, numbers["metrics"][name], text) for name, text in captions.METRIC_DESCRIPTIONS.items()]
    return table(("metric", "value", "description"), rows)


def _class_table(numbers: dict) -> str:
    keys = ("name", "AP", "AP50", "AP75", "objects", "predictions")
    return table(("class", *keys[1:]), [[row[key] for key in keys] for row in numbers["classes"]])


def _error_table(numbers: dict) -> str:
    threshold = numbers["best_threshold"]
    header = ["type", "description", "AP50 gain", "count"]
    keys = ["AP50_gain", "count"]
    if threshold is not None:
        header.append(f"count, score >= {threshold_text(threshold['score'])}")
        keys.append("count_above_threshold")
    rows = [
        (row["type"], captions.ERROR_DESCRIPTIONS[row["type"]], *(row[key] for key in keys))
        for row in numbers["errors"]
    ]
    return table(header, rows)


def _confused_pairs(numbers: dict) -> str:
    """Returns a table of the pairs of classes that are confused most often."""
    names, matrix = numbers["confusion"]["classes"], numbers["confusion"]["matrix"]
    pairs = [
        (target, predicted, matrix[row][column], matrix[row][column] / sum(matrix[row]))
        for row, target in enumerate(names)
        for column, predicted in enumerate(names)
        if row != column and matrix[row][column]
    ]
    pairs.sort(key=lambda pair: -pair[2])
    header = ("true class", "predicted class", "count", "share of the true class")
    return table(header, pairs[:MAX_PAIRS]) if pairs else ""


def _examples(examples: dict[str, Image.Image], annotations: Annotations | None) -> list[str]:
    if not examples:
        return [paragraph(captions.NO_IMAGES if annotations is None else captions.NO_EXAMPLES)]
    blocks = [paragraph(captions.EXAMPLE_COLORS)]
    for error_type, image in examples.items():
        alternative = f"Examples of {error_type} errors"
        blocks.append(figure(image, captions.ERROR_DESCRIPTIONS[error_type], alternative, error_type, photo=True))
    missing = [error_type for error_type in ERROR_TYPES if error_type not in examples]
    if missing:
        blocks.append(paragraph(captions.MISSING_EXAMPLES.format(types=", ".join(missing), score=MIN_SCORE)))
    return blocks
