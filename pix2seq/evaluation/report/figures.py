"""The charts of a report, most of them drawn by hotcoco."""

import logging
from collections.abc import Callable
from typing import Literal

import matplotlib
import numpy as np
from cycler import cycler
from hotcoco import plot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pix2seq.evaluation.report.analysis import Analysis, confusion_matrix
from pix2seq.evaluation.report.matching import ERROR_TYPES
from pix2seq.progress import progress
from pix2seq.visualization import BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILLION, figure_to_image, grid

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # hotcoco's fonts lack some weights

MAX_BARS = 30  # classes of a bar chart: of more, the worst and the best
MAX_CURVES = 10  # classes of precision-recall curves
MAX_CONFUSED = 20  # classes of a confusion matrix


def threshold_text(score: float, digits: int = 2) -> str:
    """Formats a score threshold, rounded down so that it includes the same predictions."""
    rounded = round(score, digits)
    return f"{rounded if rounded <= score else rounded - 10**-digits:.{digits}f}"


def _worst_and_best(items: list, count: int) -> list:
    """Returns `count` items of a sorted list, from both ends."""
    return items if len(items) <= count else items[: count // 2] + items[-(count // 2) :]


def _axes(
    width: float, height: float, layout: Literal["constrained", "compressed"] | None = "constrained"
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=110, layout=layout)
    return figure, figure.subplots()


def draw_classes(analysis: Analysis) -> Image.Image:
    """Draws AP and AP50 of each class, worst first."""
    names = [category["name"] for category in analysis.evaluation.coco_gt.dataset["categories"]]
    rows = [(row, name) for row, name in zip(analysis.numbers["classes"], names, strict=True) if row["AP"] is not None]
    rows = _worst_and_best(sorted(rows, key=lambda item: item[0]["AP"]), MAX_BARS)
    figure, axis = _axes(8, 1.0 + 0.28 * max(len(rows), 3))
    positions = np.arange(len(rows))
    axis.barh(positions, [row["AP50"] for row, _ in rows], 0.72, color=SKY_BLUE, label="AP50")
    axis.barh(positions, [row["AP"] for row, _ in rows], 0.4, color=BLUE, label="AP")
    for position, (row, _) in enumerate(rows):
        text = f"{row['AP']:.3f}  ({row['objects']:,} objects)"
        axis.text(max(row["AP50"], row["AP"]) + 0.008, position, text, va="center", fontsize=8)
    axis.set_yticks(positions, [name for _, name in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.2)
    axis.set_xlabel("average precision")
    figure.legend(loc="outside upper right", ncols=2)
    return figure_to_image(figure)


def draw_sizes(analysis: Analysis) -> Image.Image:
    """Draws AP and AP50 by size of the object and by number of objects in the image."""
    sizes, counts = analysis.numbers["sizes"], analysis.numbers["object_counts"]
    figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2))
    for axis, rows, names, title in (
        (axes[0], sizes, [f"{row['size']}\n{row['objects']:,} objects" for row in sizes], "size of the object"),
        (axes[1], counts, [f"{row['objects']}\n{row['images']:,} images" for row in counts], "objects per image"),
    ):
        for offset, key, color in ((-0.2, "AP", BLUE), (0.2, "AP50", SKY_BLUE)):
            values = [0.0 if row[key] is None else row[key] for row in rows]
            bars = axis.bar(np.arange(len(rows)) + offset, values, 0.38, color=color, label=key)
            axis.bar_label(bars, ["" if row[key] is None else f"{row[key]:.2f}" for row in rows], fontsize=7)
        axis.set_xticks(range(len(rows)), names, fontsize=8)
        axis.set_ylim(0, 1.08)
        axis.set_title(title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure_to_image(figure)


def draw_precision_recall(analysis: Analysis) -> Image.Image:
    """Draws the mean curves at IoU 0.5 and 0.75, and the curves of the worst and best classes at IoU 0.5."""
    ranked = [(row["AP50"], label) for label, row in enumerate(analysis.numbers["classes"], start=1)]
    ranked = _worst_and_best(sorted(item for item in ranked if item[0] is not None), MAX_CURVES)
    images = []
    for draw, kwargs in (
        (plot.pr_curve_iou_sweep, {"iou_thrs": [0.5, 0.75]}),
        (plot.pr_curve_top_n, {"iou_thr": 0.5, "cat_ids": [label for _, label in ranked]}),
    ):
        figure, axis = _axes(5, 5, layout="compressed")
        draw(analysis.evaluation, ax=axis, paper_mode=True, **kwargs)
        images.append(figure_to_image(figure))
    return grid([images])


def draw_errors(analysis: Analysis) -> Image.Image:
    """Draws the AP50 that correcting each type of error would gain."""
    figure, axis = _axes(8, 3.2)
    plot.tide_errors(analysis.evaluation_without_crowds.tide_errors(pos_thr=0.5, bg_thr=0.1), ax=axis, paper_mode=True)
    axis.set_yticks(range(len(ERROR_TYPES)), list(ERROR_TYPES))  # hotcoco abbreviates them
    axis.set_xlabel("AP50 gained")
    return figure_to_image(figure)


def draw_confusion(analysis: Analysis) -> Image.Image:
    """Draws the confusion matrix, each row divided by its sum. Of many classes, those with the most confusion."""
    matrix = confusion_matrix(analysis.evaluation_without_crowds, analysis.numbers["best_threshold"])
    num_classes = min(len(matrix["cat_names"]), MAX_CONFUSED)
    side = 3.5 + 0.4 * num_classes
    figure, axis = _axes(side + 1, side, layout=None)
    plot.confusion_matrix(matrix, top_n=num_classes, ax=axis, paper_mode=True)
    labels = [text.get_text() for text in axis.get_yticklabels()[:-1]]
    axis.set_xticks(range(num_classes + 1), [*labels, "missed"], rotation=45, ha="right")
    axis.set_yticks(range(num_classes + 1), [*labels, "background"])
    figure.subplots_adjust(left=0.2, bottom=0.2)
    return figure_to_image(figure)


def draw_calibration(analysis: Analysis) -> Image.Image:
    """Draws the share of correct predictions by score."""
    figure, axis = _axes(6, 5)
    plot.reliability_diagram(
        analysis.evaluation_without_crowds, n_bins=10, iou_threshold=0.5, ax=axis, paper_mode=True
    )
    return figure_to_image(figure)


def draw_figures(analysis: Analysis) -> dict[str, Image.Image]:
    """Draws the figures of `FIGURES`, without those that are not defined."""
    if analysis.numbers["metrics"]["AP"] is None:
        return {}
    names = [name for name in FIGURES if name != "calibration" or analysis.numbers["calibration"] is not None]
    colors = cycler(color=(BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY_BLUE))
    with plot.style(paper_mode=True), matplotlib.rc_context({"axes.prop_cycle": colors}):
        return {name: FIGURES[name](analysis) for name in progress(names, "drawing")}


FIGURES: dict[str, Callable[[Analysis], Image.Image]] = {
    "classes": draw_classes,
    "precision_recall": draw_precision_recall,
    "sizes": draw_sizes,
    "errors": draw_errors,
    "confusion": draw_confusion,
    "calibration": draw_calibration,
}
