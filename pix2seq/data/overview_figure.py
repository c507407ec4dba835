"""The figure of a dataset report: charts of its contents and example images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pix2seq.visualization import CELL, PALETTE, figure_to_image, grid, stack

MAX_CLASSES = 30  # bars in the chart; more are illegible
MAX_VALUE = 1e6  # larger box sizes and object counts are drawn as this
EXAMPLE_COLUMNS = 4


@dataclass(frozen=True)
class SplitSummary:
    """The numbers of one split that the charts show.

    Args:
        class_counts: (C,) objects of each class.
        box_sizes: (M,) square roots of the box areas, in pixels.
        objects_per_image: (N,) objects in each image.
    """

    class_counts: np.ndarray
    box_sizes: np.ndarray
    objects_per_image: np.ndarray


def dataset_overview(
    class_names: Sequence[str], splits: dict[str, SplitSummary], examples: Sequence[Image.Image], max_objects: int
) -> Image.Image:
    """Draws objects by class, box sizes, objects per image, and example images.

    Args:
        class_names: Names of the C classes.
        splits: Numbers by the name of the split.
        examples: Images with their boxes, drawn below the charts.
        max_objects: Largest number of objects in a token sequence; marked if an image has more.
    """
    figure = Figure(figsize=(13, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    _draw_class_bars(axes[0], class_names, {name: split.class_counts for name, split in splits.items()})
    sizes = {name: split.box_sizes for name, split in splits.items()}
    _draw_histogram(axes[1], sizes, title="box size (square root of the area, pixels)", log=True)
    for boundary in (32, 96):  # between COCO's small, medium and large
        axes[1].axvline(boundary, color="grey", linewidth=1, linestyle=":")
    for x, name, alignment in ((31, "small", "right"), (55, "medium", "center"), (99, "large", "left")):
        axes[1].text(x, axes[1].get_ylim()[1], name, ha=alignment, va="bottom", fontsize=7, color="grey")
    counts = {name: split.objects_per_image for name, split in splits.items()}
    _draw_histogram(axes[2], counts, title="objects per image")
    if max(int(values.max()) for values in counts.values()) > max_objects:
        axes[2].axvline(max_objects, color="black", linewidth=1)
        side = "left" if max_objects < sum(axes[2].get_xlim()) / 2 else "right"  # towards the center
        axes[2].text(max_objects, axes[2].get_ylim()[1], "--max_objects", ha=side, va="bottom", fontsize=7)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(splits), fontsize=9)
    charts = figure_to_image(figure)
    if not examples:
        return charts
    starts = range(0, len(examples), EXAMPLE_COLUMNS)
    return stack([charts, grid([examples[start : start + EXAMPLE_COLUMNS] for start in starts], cell=CELL)])


def _draw_class_bars(axis: Axes, names: Sequence[str], counts: dict[str, np.ndarray]) -> None:
    """Draws a bar for each class and split, as a share of its split, so that splits of different sizes compare."""
    displayed = np.argsort(-sum(counts.values()), kind="stable")[:MAX_CLASSES]
    height = 0.8 / len(counts)
    for row, (split, values) in enumerate(counts.items()):
        shares = values[displayed] / max(values.sum(), 1)
        positions = np.arange(len(displayed)) + (row - (len(counts) - 1) / 2) * height
        axis.barh(positions, shares, height, color=PALETTE[row + 1], label=f"{split} ({values.sum():,} objects)")
    labels = [names[label][:40] for label in displayed]
    axis.set_yticks(range(len(displayed)), labels, fontsize=8 if len(displayed) <= 12 else 6, parse_math=False)
    axis.invert_yaxis()
    suffix = f" ({MAX_CLASSES} most frequent of {len(names)})" if len(names) > MAX_CLASSES else ""
    axis.set_title(f"objects by class{suffix}", fontsize=10)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _draw_histogram(axis: Axes, values: dict[str, np.ndarray], title: str, log: bool = False) -> None:
    """Draws outlined histograms, which do not hide each other, as shares of their splits."""
    values = {split: np.clip(numbers, 0, MAX_VALUE) for split, numbers in values.items()}
    combined = np.concatenate(list(values.values()))
    highest = max(float(combined.max()), 1.0) if combined.size else 1.0
    if log:
        bins = np.geomspace(max(1.0, float(combined.min())) if combined.size else 1.0, highest + 1, 31)
    else:
        bins = np.arange(0, highest + 2, max(1, round(highest / 30))) - 0.5
    for row, (split, numbers) in enumerate(values.items()):
        if numbers.size:
            weights = np.full(numbers.size, 1 / numbers.size)
            color = PALETTE[row + 1]
            axis.hist(numbers, bins.tolist(), weights=weights, histtype="step", linewidth=2, color=color, label=split)
    if log:
        axis.set_xscale("log")
        # The names of COCO's three sizes need the space from 16 to 192.
        left, right = axis.set_xlim(min(axis.get_xlim()[0], 16), max(axis.get_xlim()[1], 192))
        ticks = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if left <= size <= right]
        axis.set_xticks(ticks, [str(size) for size in ticks], fontsize=7)
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    axis.set_title(title, fontsize=10, pad=14)
