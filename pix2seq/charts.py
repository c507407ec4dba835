"""Charts of numbers. Knows arrays and names, nothing of models or datasets."""

import io
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pix2seq.visualization import CELL, PALETTE, grid

MOST_CLASSES = 30  # bars that are still told apart
LARGEST = 1e6  # what is shown of numbers that somebody has made up


def dataset_overview(
    class_names: Sequence[str],
    class_counts: dict[str, np.ndarray],
    box_sides: dict[str, np.ndarray],
    objects_per_image: dict[str, np.ndarray],
    examples: Sequence[Image.Image],
    max_objects: int,
) -> Image.Image:
    """What a dataset holds: objects by class, sizes of boxes, objects per image, and images with their boxes.

    Arrays by the split's name: counts (C,), square roots of the boxes' areas in pixels (M,), and counts (N,).
    """
    figure = Figure(figsize=(13, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    _class_bars(axes[0], class_names, class_counts)
    _histogram(axes[1], box_sides, "size of the boxes (square root of the area, pixels)", log=True)
    for side in (32, 96):  # COCO's borders of small, medium and large
        axes[1].axvline(side, color="grey", linewidth=1, linestyle=":")
    for side, name in ((31, "small"), (55, "medium"), (99, "large")):
        place = {"small": "right", "medium": "center", "large": "left"}[name]
        axes[1].text(side, axes[1].get_ylim()[1], name, ha=place, va="bottom", fontsize=7, color="grey")
    _histogram(axes[2], objects_per_image, "objects in an image")
    most = max(int(values.max()) for values in objects_per_image.values())
    if most > max_objects:
        axes[2].axvline(max_objects, color="black", linewidth=1)
        axes[2].text(max_objects, axes[2].get_ylim()[1], "--max_objects", ha="center", va="bottom", fontsize=7)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(class_counts), fontsize=9
    )
    chart = to_image(figure)
    if not examples:
        return chart
    pictures = grid([examples[start : start + 4] for start in range(0, len(examples), 4)], cell=CELL)
    width = max(chart.width, pictures.width)
    sheet = Image.new("RGB", (width, chart.height + pictures.height), "white")
    sheet.paste(chart, ((width - chart.width) // 2, 0))
    sheet.paste(pictures, ((width - pictures.width) // 2, chart.height))
    return sheet


def learning_curves(
    runs: dict[str, dict[str, tuple[Sequence[int], Sequence[float]]]], panels: dict[str, Sequence[str]]
) -> Image.Image:
    """Metrics over the steps, (steps, values) by run and name: a row of charts for a run, one for each panel."""
    figure = Figure(figsize=(3.6 * len(panels), 2.6 * len(runs)), dpi=100, layout="constrained")
    axes = figure.subplots(len(runs), len(panels), squeeze=False)
    for row, (run, curves) in zip(axes, runs.items(), strict=True):
        for axis, (title, names) in zip(row, panels.items(), strict=True):
            for color, name in zip(PALETTE, names, strict=False):
                if name in curves:
                    axis.plot(*curves[name], color=color, linewidth=1.2, label=name.split("/")[-1])
            axis.set_title(f"{run}: {title}", fontsize=9)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            if axis.lines:
                axis.legend(fontsize=7)
    return to_image(figure)


def to_image(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # letters that the font does not have are drawn as boxes
        figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _class_bars(axis, names: Sequence[str], counts: dict[str, np.ndarray]) -> None:
    """Two bars for each class, as shares of their split: on a common scale, small splits can be compared."""
    total = sum(counts.values())
    order = np.argsort(-total, kind="stable")
    shown = order[:MOST_CLASSES]
    height = 0.8 / len(counts)
    for row, (split, values) in enumerate(counts.items()):
        shares = values[shown] / max(values.sum(), 1)
        places = np.arange(len(shown)) + (row - (len(counts) - 1) / 2) * height
        axis.barh(places, shares, height, color=PALETTE[row + 1], label=f"{split} ({values.sum():,} objects)")
    labels = [names[label][:40] for label in shown]
    axis.set_yticks(range(len(shown)), labels, fontsize=8 if len(shown) <= 12 else 6, parse_math=False)
    axis.invert_yaxis()
    more = f", the {MOST_CLASSES} commonest of {len(names)}" if len(names) > MOST_CLASSES else ""
    axis.set_title(f"objects by class{more}", fontsize=10)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _histogram(axis, values: dict[str, np.ndarray], title: str, log: bool = False) -> None:
    """Outlined steps, so that one split does not hide the other; shares of each split."""
    values = {split: np.clip(numbers, 0, LARGEST) for split, numbers in values.items()}
    everything = np.concatenate(list(values.values()))
    highest = max(float(everything.max()), 1.0) if everything.size else 1.0
    if log:
        bins = np.geomspace(max(1.0, float(everything.min())) if everything.size else 1.0, highest + 1, 31)
    else:
        bins = np.arange(0, highest + 2, max(1, round(highest / 30))) - 0.5
    for row, (split, numbers) in enumerate(values.items()):
        if numbers.size:
            weights = np.full(numbers.size, 1 / numbers.size)
            axis.hist(
                numbers, bins, weights=weights, histtype="step", linewidth=2, color=PALETTE[row + 1], label=split
            )
    if log:
        axis.set_xscale("log")
        ticks = [side for side in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if side <= highest]
        axis.set_xticks(ticks, [str(side) for side in ticks], fontsize=7)
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axis.set_title(title, fontsize=10, pad=14)
