"""The output folder of evaluate.py.

metrics.json, predictions.json          the metrics and the predictions
ground_truth.json                       the ground truth of the metrics: COCO annotations without unusable entries
evaluation.json                         the name of the annotation file, and what was skipped
predictions.png                         the first images, if the images are available
report.html, report.json, report/       the report, if requested
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pix2seq.data.issues import DatasetIssue, count_by_kind
from pix2seq.evaluation.coco_metrics import GROUND_TRUTH_KEYS, load_ground_truth
from pix2seq.evaluation.report.figures import FIGURES
from pix2seq.evaluation.report.matching import ERROR_TYPES

GROUND_TRUTH_FILE = "ground_truth.json"
NUM_LISTED = 3  # skipped images and issues that are listed


@dataclass
class Skipped:
    """What an evaluation skipped.

    Args:
        unreadable: "name: reason" of each image that cannot be read.
        issues: Issues in the entries of the annotation file.
        num_without_predictions: Images that a results file has no prediction for.
    """

    unreadable: list[str] = field(default_factory=list)
    issues: list[DatasetIssue] = field(default_factory=list)
    num_without_predictions: int = 0

    def to_json(self) -> dict:
        """Returns the counts and the first entries."""
        return {
            "unreadable_images": {"count": len(self.unreadable), "first": self.unreadable[:NUM_LISTED]},
            "annotation_issues": {
                "count": len(self.issues),
                "first": [f"{issue.entry}: {issue.value}".removeprefix(": ") for issue in self.issues[:NUM_LISTED]],
                "by_kind": dict(Counter(issue.kind for issue in self.issues).most_common()),
            },
            "images_without_predictions": self.num_without_predictions,
        }

    def lines(self) -> list[str]:
        """Returns a line about each kind of what was skipped, if there is any."""
        images, issues, _ = self.to_json().values()
        lines = []
        if images["count"]:
            lines.append(f"{images['count']:,} unreadable images: their objects count as missed. {_first(images)}")
        if issues["count"]:
            lines.append(f"Issues in the annotation file: {count_by_kind(self.issues)}. {_first(issues)}")
        if self.num_without_predictions:
            lines.append(
                f"{self.num_without_predictions:,} images without predictions: their objects count as missed."
            )
        return lines


def _first(skipped: dict) -> str:
    rest = skipped["count"] - len(skipped["first"])
    return "; ".join(skipped["first"]) + (f" (and {rest:,} more)" if rest else "")


def output_files(folder: Path) -> list[Path]:
    """Returns all files that an evaluation may write."""
    names = ["metrics.json", "predictions.json", GROUND_TRUTH_FILE, "evaluation.json", "predictions.png"]
    names += ["report.html", "report.json", *(f"report/{name}.png" for name in FIGURES)]
    names += [f"report/example_{name}.png" for name in ERROR_TYPES]
    return [folder / name for name in names]


def write_results(
    folder: Path, metrics: dict, ground_truth: dict, predictions: list[dict], annotation_file: str, skipped: Skipped
) -> None:
    """Writes the JSON files, after removing the files of an earlier evaluation. Other files are kept."""
    for path in output_files(folder):
        path.unlink(missing_ok=True)
    if (folder / "report").is_dir() and not any((folder / "report").iterdir()):
        (folder / "report").rmdir()
    used_keys = GROUND_TRUTH_KEYS | {"images": ("id", "file_name")}
    used = {key: [{k: entry[k] for k in keys} for entry in ground_truth[key]] for key, keys in used_keys.items()}
    about = {"annotation_file": Path(annotation_file).name} | skipped.to_json()
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "predictions.json").write_text(json.dumps(predictions))
    (folder / GROUND_TRUTH_FILE).write_text(json.dumps(used))
    (folder / "evaluation.json").write_text(json.dumps(about, indent=1) + "\n")


def read_ground_truth(folder: Path) -> dict | None:
    """Reads the ground truth of the metrics in an output folder, None if there is none. Raises UserError."""
    path = folder / GROUND_TRUTH_FILE
    return load_ground_truth(path) if path.is_file() else None
