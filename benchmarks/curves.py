"""What finished runs looked like while they learnt: metrics by step as a record, a figure of them, a table of a page.

python -m benchmarks.curves runs/demo runs/overfit --output docs/results/curves.json \
    --figure images/curves.png --page docs/what-to-expect.md

Train with a small `--log_every` (10, say): a row holds the means of the steps since the last one.
"""

import argparse
import json
from pathlib import Path

from benchmarks.record import record
from pix2seq.charts import learning_curves

# What the page's table and figure show, by panel.
PANELS = {
    "loss": ("train/loss_coord", "train/loss_real", "train/loss_noise"),
    "error in bins": ("train/bin_error_y1", "train/bin_error_x1", "train/bin_error_y2", "train/bin_error_x2"),
    "class tokens": ("train/acc_real", "train/acc_noise", "train/noise_predicted", "train/noise_true"),
    "objects": ("train/iou", "train/object_acc", "train/sequence_acc", "eval/AP"),
}
STEPS = (0, 100, 500, 1000)  # of the table; the row that ends there, the first one for 0


def curves(run: Path) -> dict:
    """A record, and the metrics that the panels show: {name: [steps, values]}."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for name in (name for names in PANELS.values() for name in names):
        points = [(row["step"], float(f"{row[name]:.4g}")) for row in rows if row.get(name) is not None]
        if points:
            found[name] = list(zip(*points, strict=True))
    return record(run) | {"curves": found}


def table(found: dict) -> str:
    """Metrics of a run at STEPS, as far as it came, as Markdown."""
    last = max(steps[-1] for steps, _ in found.values())
    places = [step for step in STEPS if step < last]
    lines = [f"| metric | {' | '.join(f'step {step}' for step in places)} | end |", "|---" * (len(places) + 2) + "|"]
    for name, (steps, values) in found.items():
        at = [values[min(range(len(steps)), key=lambda row, step=step: abs(steps[row] - step))] for step in places]
        if name == "eval/AP":  # is not known at each of them
            at = [value if step in steps else None for step, value in zip(places, at, strict=True)]
        cells = ["" if value is None else f"{value:.3g}" for value in (*at, values[-1])]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str, runs: dict[str, dict]) -> str:
    """The page, with the table of each run between its marks, `<!-- curves: name -->` and `<!-- end -->`."""
    for name, found in runs.items():
        before, mark, rest = page.partition(f"<!-- curves: {name} -->\n")
        if mark:
            page = before + mark + table(found["curves"]) + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn the metrics of finished runs into a record and a figure.")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; a run is called what its folder is")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, help="PNG file to write")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables to fill")
    args = parser.parse_args()
    found = {run.name: curves(run) for run in args.runs}
    args.output.write_text(json.dumps({"runs": found}) + "\n")  # on one line: thousands of numbers
    if args.figure:
        learning_curves({name: run["curves"] for name, run in found.items()}, PANELS).save(args.figure)
    if args.page:
        args.page.write_text(fill(args.page.read_text(), found))


if __name__ == "__main__":
    main()
