"""The folder evaluate.py writes: what it is called, what was scored in it, and how it is read again.

metrics.json, predictions.json   the numbers, and what they are of
scored_against.json              what was scored against: a COCO annotation file without what cannot be used
evaluation.json                  what was skipped
predictions.png, report.html, report.json, report/   where they were asked for
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pix2seq.data.issues import DatasetIssue, count_by_kind
from pix2seq.errors import UserError
from pix2seq.evaluation.coco_metrics import SCORED_KEYS, load_ground_truth
from pix2seq.evaluation.report.figures import FIGURES
from pix2seq.evaluation.report.matching import KINDS

TRUTH = "scored_against.json"
SHOWN = 3  # of what was skipped


@dataclass
class Skipped:
    """What is wrong with the files: a line for each image that cannot be read, "name: reason", and faults in entries
    of the annotation file."""

    unreadable: list[str] = field(default_factory=list)
    faults: list[DatasetIssue] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a reader, none where nothing was skipped."""
        unreadable, faults = self.as_json().values()
        lines = []
        if self.unreadable:
            lines.append(
                f"Not read: {_images(unreadable['count'])}, whose objects count as not found. {_some(unreadable)}"
            )
        if self.faults:
            what = f"{count_by_kind(self.faults)} (python -m pix2seq check says what becomes of each)"
            lines.append(f"Faults in the annotation file: {what}. {_some(faults)}")
        return lines

    def as_json(self) -> dict:
        faults = [f"{fault.entry}: {fault.value}".removeprefix(": ") for fault in self.faults[:SHOWN]]
        kinds = dict(Counter(fault.kind for fault in self.faults).most_common())
        return {
            "unreadable_images": {"count": len(self.unreadable), "first": self.unreadable[:SHOWN]},
            "annotation_faults": {"count": len(self.faults), "first": faults, "kinds": kinds},
        }


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _some(skipped: dict) -> str:
    rest = skipped["count"] - len(skipped["first"])
    return "; ".join(skipped["first"]) + (f" (and {rest:,} more)" if rest else "")


def files(folder: Path) -> list[Path]:
    """All that an evaluation may write."""
    names = ["metrics.json", "predictions.json", TRUTH, "evaluation.json", "predictions.png"]
    names += ["report.html", "report.json"]
    names += [f"report/{key}.png" for key in (*FIGURES, *(f"example_{kind}" for kind in KINDS))]
    return [folder / name for name in names]


def prepare(folder: Path) -> None:
    """Makes the folder and sees that it can be written to, before the work. Raises UserError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    for path, right in [(folder / "report", Path.is_dir), *((path, Path.is_file) for path in files(folder))]:
        if path.exists() and not right(path):
            there = "a folder" if path.is_dir() else "a file"
            raise UserError(f"--output_dir {folder}: cannot be written to ({path.name} is {there} there)")


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What goes wrong with files inside is the mistake of the user who named the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written to ({error.strerror})") from None


def write_numbers(
    folder: Path, metrics: dict, truth: dict, predictions: list[dict], scored_against: str, skipped: Skipped
) -> None:
    """All but the pictures. What an earlier evaluation left is taken away first, or it might be taken for this one's;
    nothing else in the folder is touched."""
    for path in files(folder):
        path.unlink(missing_ok=True)
    if (folder / "report").is_dir() and not any((folder / "report").iterdir()):
        (folder / "report").rmdir()
    kept = {key: [{k: entry[k] for k in keys} for entry in truth[key]] for key, keys in SCORED_KEYS.items()}
    for entry, image in zip(kept["images"], truth["images"], strict=True):
        entry["file_name"] = image["file_name"]
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (folder / "predictions.json").write_text(json.dumps(predictions))
    (folder / TRUTH).write_text(json.dumps(kept))
    about = {"ground_truth": Path(scored_against).name} | skipped.as_json()
    (folder / "evaluation.json").write_text(json.dumps(about, indent=1) + "\n")


def read_truth(path: Path) -> dict | None:
    """What predictions in a folder were scored against, None where it does not say. Raises UserError."""
    return load_ground_truth(path / TRUTH) if (path / TRUTH).is_file() else None
