"""The numbers of a report. hotcoco computes AP, error types, confusion matrix and calibration."""

from collections import Counter
from dataclasses import dataclass

import hotcoco
import numpy as np

from pix2seq.evaluation.coco_metrics import METRICS, check_predictions, class_names, evaluate_with_hotcoco, remap_ids
from pix2seq.evaluation.report.matching import (
    ERROR_TYPES,
    Error,
    Matches,
    best_threshold,
    find_errors,
    match,
    remove_crowds,
)

OBJECT_COUNTS = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))  # groups of images by number of objects
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # COCO's, by area in pixels


@dataclass
class Analysis:
    """The numbers of a report, and the data for its figures.

    Args:
        numbers: The content of report.json. None stands for a number that is not defined.
        ground_truth: COCO annotations from `remap_ids`.
        predictions: Predictions from `remap_ids`.
        errors: Result of `find_errors`.
        evaluation: hotcoco's evaluation.
        evaluation_without_crowds: The same without crowds, see `remove_crowds`.
    """

    numbers: dict
    ground_truth: dict
    predictions: list[dict]
    errors: list[Error]
    evaluation: hotcoco.COCOeval
    evaluation_without_crowds: hotcoco.COCOeval


def analyze(ground_truth: dict, predictions: list[dict], name: str = "predictions") -> Analysis:
    """Computes the numbers of a report.

    Args:
        ground_truth: COCO annotations from `load_ground_truth`.
        predictions: Entries of a COCO results file.
        name: Name of the predictions in error messages.

    Raises:
        UserError: Some predictions are invalid.
    """
    check_predictions(predictions, ground_truth, name)
    names = [name for _, name in sorted(class_names(ground_truth).items())]
    labels = [_figure_label(name) for name in names]
    ground_truth, predictions = remap_ids(ground_truth, predictions)
    evaluation = evaluate_with_hotcoco(ground_truth, predictions, labels)
    matches = match(ground_truth, predictions, evaluation)
    errors = find_errors(ground_truth, predictions, matches)
    without_crowds = evaluate_with_hotcoco(*remove_crowds(ground_truth, predictions, matches), labels)
    threshold = best_threshold(matches)
    numbers = {
        "images": len(ground_truth["images"]),
        "objects": int((~matches.is_crowd).sum()),
        "crowds": int(matches.is_crowd.sum()),
        "predictions": len(predictions),
        "metrics": {key: _or_none(value) for key, value in zip(METRICS, evaluation.stats, strict=True)},
        "classes": _by_class(evaluation, matches, names),
        "sizes": _by_size(evaluation, ground_truth),
        "object_counts": _by_object_count(evaluation, matches),
        "best_threshold": threshold,
        "errors": _error_types(without_crowds, errors, predictions, threshold),
        "confusion": _confusion(without_crowds, threshold, names),
        "calibration": _calibration(without_crowds, matches),
    }
    return Analysis(numbers, ground_truth, predictions, errors, evaluation, without_crowds)


def _figure_label(name: str) -> str:
    """Shortens a class name and escapes what matplotlib would interpret: $, and a leading _ in a legend."""
    name = (name[:29] + "…" if len(name) > 30 else name).replace("$", r"\$")
    return name if name.strip("_ ") and not name.startswith("_") else f"class {name}"


def _or_none(value: float) -> float | None:
    """COCO's value for a metric that is not defined is -1."""
    return float(value) if value > -1 else None


def mean_precision(
    evaluation: hotcoco.COCOeval, iou: int | slice = slice(None), label: int | slice = slice(None), area: int = 0
) -> float | None:
    """Computes the AP of some IoU thresholds, classes and an area range, None if there are no objects."""
    assert evaluation.eval is not None
    precision = evaluation.eval["precision"][iou, :, label, area, -1]
    precision = precision[precision > -1]
    return float(precision.mean()) if precision.size else None


def _by_class(evaluation: hotcoco.COCOeval, matches: Matches, names: list[str]) -> list[dict]:
    num_objects = np.bincount(matches.object_label[~matches.is_crowd], minlength=len(names))
    num_predictions = np.bincount(matches.label, minlength=len(names))
    return [
        {
            "name": name,
            "AP": mean_precision(evaluation, label=label),
            "AP50": mean_precision(evaluation, 0, label),
            "AP75": mean_precision(evaluation, 5, label),
            "objects": int(num_objects[label]),
            "predictions": int(num_predictions[label]),
        }
        for label, name in enumerate(names)
    ]


def _by_size(evaluation: hotcoco.COCOeval, ground_truth: dict) -> list[dict]:
    areas = [annotation["area"] for annotation in ground_truth["annotations"] if not annotation["iscrowd"]]
    return [
        {
            "size": size,
            "objects": sum(low <= area <= high for area in areas),
            "AP": mean_precision(evaluation, area=index),
            "AP50": mean_precision(evaluation, 0, area=index),
        }
        for index, (size, (low, high)) in enumerate(SIZES.items(), start=1)
    ]


def _by_object_count(evaluation: hotcoco.COCOeval, matches: Matches) -> list[dict]:
    """Groups the images by their number of objects. Images without objects have no AP."""
    counts = np.bincount(matches.object_image[~matches.is_crowd], minlength=matches.num_images)
    groups = {}
    for low, high in OBJECT_COUNTS:
        images = np.flatnonzero((counts >= low) & (counts <= (counts.max() if high is None else high)))
        name = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
        if images.size:
            groups[name] = (images + 1).tolist()
    metrics = evaluation.slice_by(groups)
    return [
        {"objects": name, "images": len(images)} | {key: _or_none(metrics[name][key]) for key in ("AP", "AP50")}
        for name, images in groups.items()
    ]


def _error_types(
    without_crowds: hotcoco.COCOeval, errors: list[Error], predictions: list[dict], threshold: dict | None
) -> list[dict]:
    """Returns the AP50 that correcting each type would gain, and the counts: of all scores, and from the threshold."""
    tide = without_crowds.tide_errors(pos_thr=0.5, bg_thr=0.1)
    has_objects = bool(without_crowds.coco_gt.dataset["annotations"])
    above = Counter(
        error.type
        for error in errors
        if threshold is not None
        and error.prediction is not None
        and predictions[error.prediction]["score"] >= threshold["score"]
    )
    return [
        {
            "type": name,
            "AP50_gain": float(tide["delta_ap"][key]) if has_objects else None,
            "count": tide["counts"][key],
            "count_above_threshold": None if name == "missed" or threshold is None else above[name],
        }
        for name, key in ERROR_TYPES.items()
    ]


def confusion_matrix(without_crowds: hotcoco.COCOeval, threshold: dict | None) -> dict:
    """Computes hotcoco's confusion matrix from the score threshold on, of all predictions if it is None."""
    return without_crowds.confusion_matrix(iou_thr=0.5, min_score=None if threshold is None else threshold["score"])


def _confusion(without_crowds: hotcoco.COCOeval, threshold: dict | None, names: list[str]) -> dict:
    """Rows are true classes, the last the background; columns are predicted classes, the last missed objects."""
    matrix = confusion_matrix(without_crowds, threshold)["matrix"].astype(int).tolist()
    return {"score": None if threshold is None else threshold["score"], "classes": names, "matrix": matrix}


def _calibration(without_crowds: hotcoco.COCOeval, matches: Matches) -> dict | None:
    """Computes the expected calibration error in 10 bins. None without objects, or if scores are not probabilities."""
    scores = matches.score[~matches.ignored[0]]
    if matches.is_crowd.all() or not scores.size or scores.min() < 0 or scores.max() > 1:
        return None
    result = without_crowds.calibration(n_bins=10, iou_threshold=0.5)
    bins = [
        {"from": part["bin_lower"], "to": part["bin_upper"], "predictions": part["count"]}
        | {"score": part["avg_confidence"], "correct": part["avg_accuracy"]}
        for part in result["bins"]
        if part["count"]
    ]
    return {"ECE": float(result["ece"]), "bins": bins}
