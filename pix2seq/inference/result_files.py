"""The files that predict.py writes."""

import csv
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pix2seq.errors import UserError
from pix2seq.evaluation import coco_results
from pix2seq.inference.results import DetectionResult
from pix2seq.models.detections import Detections

# The files that each format writes for all images together.
FORMATS = {"coco": ("predictions.json", "images.json"), "yolo": ("classes.txt",), "csv": ("predictions.csv",)}
CSV_COLUMNS = ("file_name", "class", "score", "x1", "y1", "x2", "y2")


def prepare_output_dir(path: Path, files: Sequence[str], inputs: Iterable[str], overwrite: bool) -> None:
    """Creates the output folder and checks that the files can be written.

    Args:
        path: The folder.
        files: Names of all files that may be written to it.
        inputs: Files that must not be overwritten.
        overwrite: Whether files of these names are deleted if they exist.

    Raises:
        UserError: A file exists, or the folder cannot be written to. Nothing has been deleted.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        existing = [file for file in files if os.path.lexists(path / file)]
        input_paths = {os.path.realpath(file) for file in inputs}
        for file in existing:
            if os.path.realpath(path / file) in input_paths:
                raise UserError(f"--output_dir {path}: {file} is an input; name another folder")
        if existing and not overwrite:
            more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
            raise UserError(f"--output_dir {path}: {existing[0]}{more} exists; name another folder or add --overwrite")
        for folder in {path, *((path / file).parent for file in files)}:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        for file in existing:
            (path / file).unlink()
    except FileExistsError:
        raise UserError(f"--output_dir {path}: is a file; name a folder") from None
    except OSError as error:
        raise UserError(f"--output_dir {path}: cannot be written to ({error.strerror})") from None


def coco_entries(result: DetectionResult, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """The entries of a COCO results file for one image, each with a `category_name`."""
    detections = Detections(boxes=result.boxes, labels=result.labels, scores=result.scores)
    entries = coco_results(image_id, detections, category_ids)
    return [entry | {"category_name": name} for entry, name in zip(entries, result.names, strict=True)]


def write_yolo_labels(path: Path, result: DetectionResult) -> None:
    """Writes a YOLO label file: class, centre x and y, width and height as fractions of the image, score."""
    height, width = result.size
    lines = []
    for label, (x1, y1, x2, y2), score in zip(result.labels, result.boxes, result.scores, strict=True):
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(f"{label} {' '.join(f'{value:.6f}' for value in box)} {score:.6f}\n")
    path.write_text("".join(lines))


def write_results(
    folder: Path,
    formats: Sequence[str],
    results: Sequence[DetectionResult],
    names: dict[str, str],
    *,
    category_ids: Sequence[int],
    class_names: Sequence[str],
) -> None:
    """Writes the files of each format for all images together.

    Args:
        folder: The output folder.
        formats: Keys of `FORMATS`.
        results: One result per image.
        names: Image -> name of its output files, see `unique_names`.
        category_ids: Original category id of each label.
        class_names: Name of each label.
    """
    predictions: list[dict] = []
    images, table = [], []
    for image_id, result in enumerate(results, start=1):
        height, width = result.size
        size_or_error = {"error": result.error} if result.error else {"height": height, "width": width}
        images.append({"id": image_id, "file_name": result.source, "name": names[str(result.source)]} | size_or_error)
        entries = coco_entries(result, image_id, category_ids)
        predictions += [entry | {"file_name": result.source} for entry in entries]
        for class_name, score, box in zip(result.names, result.scores, result.boxes, strict=True):
            table.append((result.source, class_name, float(score), *box.tolist()))
    if "coco" in formats:
        (folder / "predictions.json").write_text(json.dumps(predictions))
        (folder / "images.json").write_text(json.dumps(images))
    if "yolo" in formats:
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in class_names), "utf-8")
    if "csv" in formats:
        # surrogateescape: names of files need not be UTF-8.
        with (folder / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([CSV_COLUMNS, *table])
