"""What a detector gets right and what it gets wrong: report.html, its figures as PNG files, its numbers as JSON."""

import json
from pathlib import Path

from PIL import Image

from pix2seq.data import Annotations
from pix2seq.evaluation.coco_metrics import METRICS
from pix2seq.evaluation.output_folder import Skipped
from pix2seq.evaluation.report import captions
from pix2seq.evaluation.report.analysis import Analysis, analyse
from pix2seq.evaluation.report.examples import LEAST_SCORE, example_images
from pix2seq.evaluation.report.figures import FIGURES, threshold
from pix2seq.evaluation.report.html import Section, figure, page, paragraph, points, table
from pix2seq.evaluation.report.matching import KINDS
from pix2seq.progress import progress

MOST_PAIRS = 10  # of confused classes


def write_report(
    folder: Path,
    truth: dict,
    predictions: list[dict],
    annotations: Annotations | None,
    name: str,
    title: str,
    skipped: Skipped,
) -> None:
    """report.html, report.json and report/*.png in a folder. Without `annotations` there are no example pictures.

    Raises UserError, in which the predictions are called `name`, and OSError.
    """
    analysis = analyse(truth, predictions, name)
    charts = {key: draw(analysis.numbers) for key, draw in progress(FIGURES.items(), "drawing")}
    examples = example_images(analysis, annotations) if annotations is not None else {}
    summary = Section("summary", "In short", [points(_summary(analysis.numbers) + skipped.lines())])
    sections = [summary, *_sections(analysis, charts, examples, annotations)]
    text = page(f"Evaluation of {title}", _facts(analysis), sections, captions.FOOTER)
    (folder / "report").mkdir(exist_ok=True)
    for key, image in (charts | {f"example_{kind}": image for kind, image in examples.items()}).items():
        image.save(folder / "report" / f"{key}.png")
    (folder / "report.json").write_text(json.dumps(analysis.numbers, indent=1) + "\n")
    (folder / "report.html").write_text(text, encoding="utf-8")


def _facts(analysis: Analysis) -> str:
    numbers = analysis.numbers
    crowds = f" and {numbers['crowds']:,} crowds" if numbers["crowds"] else ""
    return (
        f"{numbers['images']:,} images, {numbers['objects']:,} objects{crowds} of {len(numbers['classes'])} classes, "
        f"{numbers['predictions']:,} predictions"
    )


def _sections(
    analysis: Analysis, charts: dict[str, Image.Image], examples: dict[str, Image.Image], annotations
) -> list[Section]:
    numbers = analysis.numbers

    def chart(key: str) -> str:
        return figure(charts[key], captions.CAPTIONS[key], captions.ALTERNATIVES[key])

    point = numbers["operating_point"]
    counted = captions.NOTHING_RIGHT if point is None else _at(captions.THRESHOLD, point, 3)
    return [
        Section("metrics", "The COCO numbers", [_metrics_table(numbers)]),
        Section("classes", "Classes", [chart("classes"), _class_table(numbers)]),
        Section("curves", "Precision and recall", [chart("precision_recall")]),
        Section("sizes", "Size and number", [chart("sizes")]),
        Section("errors", "Kinds of errors", [chart("errors"), _error_table()]),
        Section("confusion", "Confusion", [chart("confusion"), paragraph(counted), _confusions(numbers)]),
        Section("duplicates", "Duplicates", [paragraph(_duplicates(numbers))]),
        Section("calibration", "Scores", [chart("calibration")]),
        Section("kept", "Objects kept", [chart("kept")]),
        Section("examples", "Examples of errors", _examples(examples, annotations)),
    ]


def _at(caption: str, point: dict[str, float], digits: int) -> str:
    return caption.format(**point | {"score": threshold(point["score"], digits)})


def _examples(examples: dict[str, Image.Image], annotations: Annotations | None) -> list[str]:
    if not examples:
        return [paragraph(captions.NO_PICTURES if annotations is None else captions.UNREADABLE)]
    shown = [
        figure(image, captions.EXAMPLES[kind], f"Pictures with {kind} errors", kind, photo=True)
        for kind, image in examples.items()
    ]
    rest = [kind for kind in KINDS if kind not in examples]
    if rest:
        shown.append(paragraph(captions.NONE_OF_A_KIND.format(kinds=", ".join(rest), score=LEAST_SCORE)))
    return [paragraph(captions.COLORS), *shown]


def _metrics_table(numbers: dict) -> str:
    rows = [(name, numbers["metrics"][name], captions.MEANINGS[name]) for name in METRICS]
    return table(("number", "value", "what it is"), rows)


def _class_table(numbers: dict) -> str:
    keys = ("name", "AP", "AP50", "AP75", "objects", "predictions")
    return table(("class", *keys[1:]), [[row[key] for key in keys] for row in numbers["classes"]])


def _confusions(numbers: dict) -> str:
    """The pairs of classes that are confused most often."""
    names, matrix = numbers["confusion"]["classes"], numbers["confusion"]["matrix"]
    pairs = [
        (there, said, matrix[row][column], matrix[row][column] / sum(matrix[row]))
        for row, there in enumerate(names)
        for column, said in enumerate(names)
        if row != column and matrix[row][column]
    ]
    pairs.sort(key=lambda pair: -pair[2])
    return (
        table(("what is there", "what is said", "times", "share of what is there"), pairs[:MOST_PAIRS])
        if pairs
        else ""
    )


def _error_table() -> str:
    return table(("kind", "what it is"), list(captions.EXAMPLES.items()))


def _duplicates(numbers: dict) -> str:
    found = numbers["duplicates"]
    if not found["count"]:
        return "No object is found twice: nothing to be gained here."
    return captions.DUPLICATES.format(
        count=found["count"], total=numbers["predictions"], before=found["with"], without=found["without"]
    )


def _summary(numbers: dict) -> list[str]:
    """What somebody should know who reads no further."""
    metrics, point = numbers["metrics"], numbers["operating_point"]
    if metrics["AP"] is None:
        return ["There is nothing to find in these images: AP is not defined."]
    worst = max(numbers["errors"]["kinds"], key=lambda row: row["dAP"])
    ranked = sorted((row for row in numbers["classes"] if row["AP"] is not None), key=lambda row: row["AP"])
    lines = [
        f"AP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f}, AP75 {metrics['AP75']:.3f}.",
        captions.NONE_RIGHT if point is None else _at(captions.AT_THRESHOLD, point, 2),
    ]
    if worst["dAP"] > 0:
        lines.append(
            f"Most is lost to {captions.LOST_TO[worst['kind']]}: without them AP50 would be {worst['dAP']:.3f} higher."
        )
    if len(ranked) > 1:
        lines.append(
            f"Worst class: {ranked[0]['name']} (AP {ranked[0]['AP']:.3f}, {ranked[0]['objects']:,} objects); "
            f"best: {ranked[-1]['name']} ({ranked[-1]['AP']:.3f})."
        )
    if (error := numbers["calibration"]["ECE"]) is not None:
        lines.append(f"Scores are off by {error:.3f} on average, if they are read as probabilities.")
    return lines
