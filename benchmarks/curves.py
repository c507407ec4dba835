"""Writes the metrics of finished runs by step: a record, a figure and the tables of a page.

Runs that the record contains already, and that are not named, are kept.

python -m benchmarks.curves runs/demo runs/overfit --output docs/results/curves.json \
    --figure images/curves.png --page docs/what-to-expect.md

Train with a small `--log_every`, for example 10: a row contains the means of the steps since the last one.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from benchmarks.record import record
from pix2seq.visualization import PALETTE, figure_to_image

# Metrics of the table and the figure, by panel.
PANELS = {
    "loss": ("train/loss_coord", "train/loss_real", "train/loss_noise"),
    "error in bins": ("train/bin_error_y1", "train/bin_error_x1", "train/bin_error_y2", "train/bin_error_x2"),
    "class tokens": ("train/acc_real", "train/acc_noise", "train/noise_predicted", "train/noise_true"),
    "objects": ("train/iou", "train/object_acc", "train/sequence_acc", "eval/AP"),
}
STEPS = (0, 100, 500, 1000)  # columns of the table; the row that ends at the step, the first one for 0


def curves(run: Path) -> dict:
    """The record of a run with the metrics of the panels, {name: [steps, values]}."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = {}
    for name in (name for names in PANELS.values() for name in names):
        points = [(row["step"], float(f"{row[name]:.4g}")) for row in rows if row.get(name) is not None]
        if points:
            metrics[name] = list(zip(*points, strict=True))
    return record(run) | {"curves": metrics}


def table(metrics: dict) -> str:
    """Metrics of a run at STEPS as a Markdown table."""
    last = max(steps[-1] for steps, _ in metrics.values())
    columns = [step for step in STEPS if step < last]
    lines = [f"| metric | {' | '.join(f'step {step}' for step in columns)} | end |", "|---" * (len(columns) + 2) + "|"]
    for name, (steps, values) in metrics.items():
        at = [values[min(range(len(steps)), key=lambda row, step=step: abs(steps[row] - step))] for step in columns]
        if name == "eval/AP":  # is not computed at every step
            at = [value if step in steps else None for step, value in zip(columns, at, strict=True)]
        cells = ["" if value is None else f"{value:.3g}" for value in (*at, values[-1])]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str, runs: dict[str, dict]) -> str:
    """Replaces the table of each run between `<!-- curves: name -->` and `<!-- end -->`."""
    for name, run in runs.items():
        before, mark, rest = page.partition(f"<!-- curves: {name} -->\n")
        if mark:
            page = before + mark + table(run["curves"]) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return page


def learning_curves(
    runs: dict[str, dict[str, tuple[Sequence[int], Sequence[float]]]], panels: dict[str, Sequence[str]]
) -> Image.Image:
    """Draws metrics over the steps: a row of charts for each run, one chart for each panel.

    Args:
        runs: (steps, values) by metric name, by run name.
        panels: Metric names by panel title.
    """
    figure = Figure(figsize=(3.6 * len(panels), 2.6 * len(runs)), dpi=100, layout="constrained")
    axes = figure.subplots(len(runs), len(panels), squeeze=False)
    for row, (run, metrics) in zip(axes, runs.items(), strict=True):
        for axis, (title, names) in zip(row, panels.items(), strict=True):
            for color, name in zip(PALETTE, names, strict=False):
                if name in metrics:
                    axis.plot(*metrics[name], color=color, linewidth=1.2, label=name.split("/")[-1])
            axis.set_title(f"{run}: {title}", fontsize=9)
            axis.set_ylim(bottom=0)
            axis.tick_params(labelsize=7)
            if axis.lines:
                axis.legend(fontsize=7)
    return figure_to_image(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a record and a figure of the metrics of finished runs.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; a run has the name of its folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables to fill")
    args = parser.parse_args()
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else {}
    runs |= {run.name: curves(run) for run in args.runs}
    args.output.write_text(json.dumps({"runs": runs}) + "\n")  # one line: thousands of numbers
    if args.figure:
        learning_curves({name: run["curves"] for name, run in runs.items()}, PANELS).save(args.figure)
    if args.page:
        args.page.write_text(fill(args.page.read_text(), runs))


if __name__ == "__main__":
    main()
