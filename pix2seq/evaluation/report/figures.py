"""The charts of a report, from its numbers. Colours are Okabe and Ito's; nothing is told by colour alone."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pix2seq.charts import to_image
from pix2seq.visualization import PALETTE

ORANGE, SKY, GREEN, _, BLUE, VERMILLION, _ = PALETTE
WIDTH = 10.0  # inches
MOST_CLASSES = 30  # of a bar chart: more, and the worst and best are shown
MOST_CURVES = 3  # worst and best classes among the precision-recall curves
MOST_CONFUSED = 20  # classes of a confusion matrix


def _axes(height: float, columns: int = 1, **kwargs):
    figure = Figure(figsize=(WIDTH, height), dpi=120, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **kwargs)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _value(value: float | None) -> float:
    return 0.0 if value is None else value


def threshold(score: float, digits: int = 2) -> str:
    """Rounded down: from the number that is shown on, all boxes that were counted count."""
    near = round(score, digits)
    return f"{near if near <= score else near - 10**-digits:.{digits}f}"


def _said(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _bars(axis, names: list[str], rows: list[dict], title: str) -> None:
    """AP and AP50 of each row, with the number over the bar."""
    for place, (key, color) in enumerate((("AP", BLUE), ("AP50", ORANGE))):
        spots = np.arange(len(rows)) + (place - 0.5) * 0.4
        axis.bar(spots, [_value(row[key]) for row in rows], 0.38, color=color, label=key)
        for spot, row in zip(spots, rows, strict=True):
            text = "" if row[key] is None else f"{row[key]:.2f}"
            axis.text(spot, _value(row[key]), text, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(names)), names, fontsize=8, parse_math=False)
    axis.set_ylim(0, 1.08)
    axis.set_title(title, fontsize=10)


def classes(numbers: dict) -> Image.Image:
    """AP of each class, the worst at the top; of many, the worst and the best."""
    rows = [row for row in numbers["classes"] if row["AP"] is not None]
    rows.sort(key=lambda row: row["AP"])
    many = len(rows) > MOST_CLASSES
    if many:
        rows = rows[: MOST_CLASSES // 2] + rows[-MOST_CLASSES // 2 :]
    figure, (axis,) = _axes(1.0 + 0.28 * max(len(rows), 3))
    places = np.arange(len(rows))
    axis.barh(places, [row["AP50"] for row in rows], 0.72, color=SKY, label="AP50")
    axis.barh(places, [row["AP"] for row in rows], 0.4, color=BLUE, label="AP")
    for place, row in enumerate(rows):
        text = f"{row['AP']:.3f}  ({row['objects']:,} objects)"
        axis.text(max(row["AP50"], row["AP"]) + 0.008, place, text, va="center", fontsize=8)
    if many:
        axis.axhline(MOST_CLASSES // 2 - 0.5, color="grey", linestyle=":")
    axis.set_yticks(places, [row["name"][:40] for row in rows], fontsize=9, parse_math=False)
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axis.set_xlim(0, 1.18)
    axis.set_xticks(np.linspace(0, 1, 6))
    _legend_above(figure, axis)
    what = f"the {MOST_CLASSES // 2} worst and best classes" if many else "by class, worst first"
    axis.set_title(f"average precision, {what}", fontsize=10)
    return to_image(figure)


def precision_recall(numbers: dict) -> Image.Image:
    """The mean over the classes at IoU 0.5 and 0.75, and the curves of the worst and best classes at 0.5."""
    found = numbers["precision_recall"]
    figure, axes = _axes(3.9, 2, sharey=True)
    for iou, color, style in (("0.50", BLUE, "-"), ("0.75", ORANGE, "--")):
        if found["mean"] is not None:
            area = np.mean(found["mean"][iou])
            axes[0].plot(found["recall"], found["mean"][iou], style, color=color, label=f"IoU {iou}: area {area:.3f}")
    axes[0].set_title("mean of all classes", fontsize=10)
    ranked = sorted(found["classes"], key=lambda name: np.mean(found["classes"][name]["0.50"]))
    if len(ranked) > 2 * MOST_CURVES:
        ranked = ranked[:MOST_CURVES] + ranked[-MOST_CURVES:]
        axes[1].set_title(f"the {MOST_CURVES} worst and best classes, IoU 0.5", fontsize=10)
    else:
        axes[1].set_title("each class, IoU 0.5, worst first", fontsize=10)
    colors = (VERMILLION, ORANGE, PALETTE[6], SKY, GREEN, BLUE)
    for number, name in enumerate(ranked):
        values = found["classes"][name]["0.50"]
        # The number first: a legend leaves out what begins with an underscore, and names may.
        style = ("-", "--", ":")[number % 3]
        axes[1].plot(found["recall"], values, style, color=colors[number], label=f"{np.mean(values):.3f} {name[:30]}")
    for axis in axes:
        axis.set(xlabel="recall: share of the objects that is found", xlim=(0, 1.01), ylim=(0, 1.03))
        _legend(axis, "lower left")
    axes[0].set_ylabel("precision: share of the boxes that is right")
    return to_image(figure)


def _legend_above(figure: Figure, axis) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", fontsize=8, ncols=2)


def _legend(axis, place: str) -> None:
    """Names of classes may hold dollars, which mean something to a legend."""
    if axis.get_legend_handles_labels()[0]:
        for text in axis.legend(loc=place, fontsize=8).get_texts():
            text.set_parse_math(False)


def sizes(numbers: dict) -> Image.Image:
    """AP by COCO's sizes and by quarters of the objects, and by how many objects an image has."""
    figure, axes = _axes(3.5, 3, sharey=True, width_ratios=(3, 5, 5))
    rows = numbers["by_size"]
    _bars(axes[0], [f"{row['size']}\n{row['objects']:,} obj." for row in rows], rows, "size of the object (COCO's)")
    rows = numbers["by_quarter"]
    names = ["{:.0f} to {:.0f}\n{:,} obj.".format(*row["side"], row["objects"]) for row in rows]
    _bars(axes[1], names, rows, "side of the object in pixels, in quarters")
    rows = [row for row in numbers["by_count"] if row["objects"] != "0"]
    names = [f"{row['objects']}\n{row['images']:,} images" for row in rows]
    _bars(axes[2], names, rows, "objects in the image")
    _legend_above(figure, axes[0])
    return to_image(figure)


def confusion(numbers: dict) -> Image.Image:
    """Shares of each row; of many classes, those that are confused most."""
    matrix = np.array(numbers["confusion"]["matrix"])
    names = [*numbers["confusion"]["classes"], "background"]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    count = len(names) - 1
    title = "all classes"
    if count > MOST_CONFUSED:
        wrong = matrix[:count, :count] - np.diag(np.diag(matrix[:count, :count]))
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:MOST_CONFUSED])
        shown = [*shown, count]
        matrix, shares = (values[np.ix_(shown, shown)] for values in (matrix, shares))
        names, title = [names[row] for row in shown], f"the {MOST_CONFUSED} of {count} classes that are confused most"
    size = len(names)
    figure, (axis,) = _axes(min(2.2 + 0.5 * size, 9.5))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(matrix.shape):
        if matrix[row, column]:
            color = "white" if shares[row, column] > 0.55 else "black"
            text = f"{matrix[row, column]:,}" + (f"\n{shares[row, column]:.0%}" if size <= 12 else "")
            axis.text(column, row, text, ha="center", va="center", fontsize=8 if size <= 12 else 6, color=color)
    labels = [name[:20] for name in names[:-1]]
    axis.set_xticks(range(size), [*labels, "missed"], fontsize=8, parse_math=False, rotation=0 if size <= 9 else 60)
    axis.set_yticks(range(size), [*labels, "background"], fontsize=8, parse_math=False)
    axis.axhline(size - 1.5, color="grey", linewidth=1)
    axis.axvline(size - 1.5, color="grey", linewidth=1)
    axis.set(xlabel="what the detector says", ylabel="what is there")
    axis.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axis, label="share of the row", format=lambda value, _: f"{value:.0%}", pad=0.01)
    return to_image(figure)


def errors(numbers: dict) -> Image.Image:
    """What correcting each kind of error would give, and how many there are; of boxes that count, in brackets."""
    rows = numbers["errors"]["kinds"]
    figure, (gain, count) = _axes(3.2, 2, sharey=True)
    names, places = [row["kind"] for row in rows], np.arange(len(rows))
    gains = [_value(row["dAP"]) for row in rows]
    gain.barh(places, gains, 0.65, color=VERMILLION)
    gain.set_xlim(0, 1.18 * max(*gains, 1e-3))
    count.barh(places, [row["count"] for row in rows], 0.65, color=SKY, label="of any score")
    if (point := numbers["operating_point"]) is not None:
        sure = [row["count_at_operating_point"] or 0 for row in rows]
        count.barh(places, sure, 0.35, color=BLUE, label=f"of score {threshold(point['score'])} or more")
    count.set_xscale("symlog", linthresh=1)
    count.set_xlim(0, 20 * max(*(row["count"] for row in rows), 1))
    _legend_above(figure, count)
    for place, row in zip(places, rows, strict=True):
        gain.text(gains[place], place, f" {_said(row['dAP'])}", va="center", fontsize=9)
        of_them = "" if row["count_at_operating_point"] is None else f" ({row['count_at_operating_point']:,})"
        count.text(max(row["count"], 0.05), place, f" {row['count']:,}{of_them}", va="center", fontsize=9)
    gain.set_yticks(places, names, fontsize=9)
    gain.invert_yaxis()
    gain.set_title(f"AP50 gained if it were corrected (AP50 is {_said(numbers['errors']['AP50'])})", fontsize=10)
    count.set_title("number of errors (logarithmic)", fontsize=10)
    return to_image(figure)


def calibration(numbers: dict) -> Image.Image:
    """Share of right predictions by score, and how many there are of each score."""
    bins = [part for part in numbers["calibration"]["bins"] if part["predictions"]]
    figure, (curve, count) = _axes(3.7, 2)
    curve.plot([0, 1], [0, 1], ":", color="grey", label="as it should be")
    score, right = [part["score"] for part in bins], [part["right"] for part in bins]
    curve.vlines(score, score, right, color=VERMILLION, linewidth=2, alpha=0.5, label="gap")
    curve.plot(score, right, "o-", color=BLUE, label="this detector")
    curve.set(xlabel="mean score", ylabel="share that is right (IoU 0.5)", xlim=(0, 1.02), ylim=(0, 1.03))
    curve.set_title(f"expected calibration error {_said(numbers['calibration']['ECE'])}", fontsize=10)
    curve.legend(loc="upper left", fontsize=8)
    middles = [(part["from"] + part["to"]) / 2 for part in bins]
    count.bar(middles, [part["predictions"] for part in bins], 0.09, color=SKY)
    count.set(xlabel="score", ylabel="predictions", xlim=(0, 1))
    count.set_yscale("symlog", linthresh=1)
    count.set_title("predictions of each score (logarithmic)", fontsize=10)
    return to_image(figure)


def kept(numbers: dict) -> Image.Image:
    rows = [row for row in numbers["kept"] if row["AP"] is not None]
    figure, (axis,) = _axes(3.0)
    for key, color, style in (("AP50", ORANGE, "s--"), ("AP", BLUE, "o-")):
        values = [row[key] for row in rows]
        axis.plot(range(len(rows)), values, style, color=color, label=key)
        below = -14 if key == "AP" else 6
        for place, value in enumerate(values):
            axis.annotate(
                f"{value:.3f}", (place, value), (0, below), textcoords="offset points", ha="center", fontsize=8
            )
    axis.set_xticks(range(len(rows)), [str(row["kept"]) for row in rows])
    axis.set(xlabel="predictions kept of each image, best score first", ylim=(-0.08, 1.1))
    axis.legend(loc="lower right", fontsize=8)
    return to_image(figure)


FIGURES: dict[str, Callable[[dict], Image.Image]] = {
    "classes": classes,
    "precision_recall": precision_recall,
    "sizes": sizes,
    "confusion": confusion,
    "errors": errors,
    "calibration": calibration,
    "kept": kept,
}
