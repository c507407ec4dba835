"""All numbers of a report. AP and what belongs to it are hotcoco's, which are pycocotools'."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from pix2seq.evaluation.coco_metrics import METRICS, check_predictions, class_names, evaluate_fast, remap_ids
from pix2seq.evaluation.report.matching import (
    KINDS,
    Error,
    Matches,
    find_errors,
    match,
    operating_point,
    without_crowds,
)
from pix2seq.progress import progress

KEPT = (1, 2, 5, 10, 20, 50, 100)  # objects of an image, best score first
GROUPS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, None))  # of images, by the number of their objects
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # COCO's, of areas
BINS = 10  # of scores


@dataclass
class Analysis:
    """The numbers, and what they were counted from, numbered from 1: for the pictures."""

    numbers: dict
    truth: dict
    predictions: list[dict]
    errors: list[Error]


def analyse(truth: dict, predictions: list[dict], name: str = "predictions") -> Analysis:
    """`numbers` can be written as JSON; None stands where there is nothing to find. Raises UserError."""
    check_predictions(predictions, truth, name)
    names = [name for _, name in sorted(class_names(truth).items())]
    truth, predictions = remap_ids(truth, predictions)
    evaluation = evaluate_fast(truth, predictions)
    matches = match(truth, predictions)
    errors = find_errors(truth, predictions, matches)
    plain = without_crowds(truth, predictions, matches)
    plain_split = plain.tide_errors(pos_thr=0.5, bg_thr=0.1)
    something = bool(matches.counted.any())  # to find: else these numbers are not defined, and hotcoco says 0
    calibrated = calibration(plain, predictions if something else [])
    point = operating_point(matches)
    wrong = [error for error in errors if error.prediction >= 0]
    least = None if point is None else point["score"]
    sure = Counter(e.kind for e in wrong if least is not None and predictions[e.prediction]["score"] >= least)
    confused = confusion(plain, least, names)
    del plain  # as large as all predictions
    numbers = {
        "images": len(truth["images"]),
        "objects": int(matches.counted.sum()),
        "crowds": int((~matches.counted).sum()),
        "predictions": len(predictions),
        "metrics": {key: _number(value) for key, value in zip(METRICS, evaluation.stats, strict=True)},
        "classes": by_class(evaluation, matches, predictions, names),
        "precision_recall": precision_recall(evaluation, names),
        "by_size": by_size(evaluation, truth),
        "by_quarter": by_quarter(truth, predictions),
        "by_count": by_count(evaluation, matches),
        "operating_point": point,
        "confusion": confused,
        "errors": {
            "AP50": float(plain_split["ap_base"]) if something else None,
            "kinds": [
                {
                    "kind": kind,
                    "dAP": float(plain_split["delta_ap"][key]) if something else None,
                    "count": plain_split["counts"][key],
                    "count_at_operating_point": None if kind == "missed" or point is None else sure[kind],
                }
                for kind, key in KINDS.items()
            ],
        },
        "duplicates": duplicates(truth, predictions, errors, evaluation),
        "calibration": calibrated,
        "kept": [
            {"kept": count} | _aps(evaluate_fast(truth, best_of_each(predictions, count)))
            for count in progress(KEPT, "keeping fewer")
        ],
    }
    return Analysis(numbers, truth, predictions, errors)


def _number(value: float) -> float | None:
    """COCO says -1 where there is nothing to find."""
    return float(value) if value > -1 else None


def mean_precision(evaluation, iou=slice(None), label=slice(None), area: int = 0) -> float | None:
    """AP of some IoU thresholds, classes and an area: the mean of what COCO's `precision` has of them."""
    values = evaluation.eval["precision"][iou, :, label, area, -1]
    values = values[values > -1]
    return float(values.mean()) if values.size else None


def _aps(evaluation, area: int = 0) -> dict:
    return {"AP": mean_precision(evaluation, area=area), "AP50": mean_precision(evaluation, 0, area=area)}


def by_class(evaluation, matches: Matches, predictions: list[dict], names: list[str]) -> list[dict]:
    objects = np.bincount(matches.object_label[matches.counted], minlength=len(names))
    said = Counter(row["category_id"] - 1 for row in predictions)
    return [
        {
            "name": name,
            "AP": mean_precision(evaluation, label=label),
            "AP50": mean_precision(evaluation, 0, label),
            "AP75": mean_precision(evaluation, 5, label),
            "objects": int(objects[label]),
            "predictions": said[label],
        }
        for label, name in enumerate(names)
    ]


def precision_recall(evaluation, names: list[str]) -> dict:
    """Precision at 101 recalls, at IoU 0.5 and 0.75: the mean over the classes, and of each class that has objects."""
    precision = evaluation.eval["precision"][[0, 5], :, :, 0, -1]  # (2, 101, classes)
    present = np.flatnonzero((precision > -1).all(axis=(0, 1)))

    def curves(values: np.ndarray) -> dict[str, list[float]]:
        return {iou: values[row].tolist() for row, iou in enumerate(("0.50", "0.75"))}

    return {
        "recall": np.linspace(0, 1, precision.shape[1]).tolist(),
        "mean": curves(precision[:, :, present].mean(axis=2)) if present.size else None,
        "classes": {names[label]: curves(precision[:, :, label]) for label in present},
    }


def _objects_within(truth: dict, borders: tuple[float, float]) -> int:
    low, high = borders
    return sum(low <= entry["area"] <= high for entry in truth["annotations"] if not entry["iscrowd"])


def by_size(evaluation, truth: dict) -> list[dict]:
    return [
        {"size": size, "objects": _objects_within(truth, borders)} | _aps(evaluation, area)
        for area, (size, borders) in enumerate(SIZES.items(), start=1)
    ]


def by_quarter(truth: dict, predictions: list[dict]) -> list[dict]:
    """The objects in four parts of the same number, by area: COCO's sizes may all be one where images are small.

    `side` is the root of the area in pixels, from and to.
    """
    areas = [entry["area"] for entry in truth["annotations"] if not entry["iscrowd"]]
    edges = np.unique(np.quantile(areas, np.linspace(0, 1, 5))) if areas else []
    if len(edges) < 3:
        return []
    borders = {f"{low}": (float(low), float(high)) for low, high in zip(edges, edges[1:], strict=False)}
    evaluation = evaluate_fast(truth, predictions, borders)
    return [
        {"side": [float(np.sqrt(value)) for value in pair], "objects": _objects_within(truth, pair)}
        | _aps(evaluation, area)
        for area, pair in enumerate(borders.values())
    ]


def by_count(evaluation, matches: Matches) -> list[dict]:
    """Images in groups by how many objects they have. Without any, AP is not defined."""
    counts = np.bincount(matches.object_image[matches.counted], minlength=matches.num_images)
    groups = {}
    for low, high in GROUPS:
        images = np.flatnonzero((counts >= low) & (counts <= (high if high is not None else counts.max())))
        name = f"{low} or more" if high is None else str(low) if low == high else f"{low} to {high}"
        if images.size:
            groups[name] = (images + 1).tolist()
    found = evaluation.slice_by(groups)
    return [
        {
            "objects": name,
            "images": len(images),
            "AP": _number(found[name]["AP"]),
            "AP50": _number(found[name]["AP50"]),
        }
        for name, images in groups.items()
    ]


def confusion(plain, score: float | None, names: list[str]) -> dict:
    """Matrix (C + 1, C + 1): rows are the truth, the last the background; columns what was predicted, the last missed.

    Of predictions of at least `score`, all if it is None, matched at IoU 0.5 whatever their class, best score first.
    """
    found = plain.confusion_matrix(iou_thr=0.5, min_score=score)
    return {"score": score, "IoU": 0.5, "classes": names, "matrix": found["matrix"].astype(int).tolist()}


def duplicates(truth: dict, predictions: list[dict], errors: list[Error], evaluation) -> dict:
    """How many predictions find what a better one of the same class has found, and AP if they were not there."""
    rows = {error.prediction for error in errors if error.kind == "duplicate"}
    rest = [row for number, row in enumerate(predictions) if number not in rows]
    return {"count": len(rows), "with": _aps(evaluation), "without": _aps(evaluate_fast(truth, rest))}


def calibration(plain, predictions: list[dict]) -> dict:
    """Score bins, and the expected calibration error: how far the score is from the share that is right, on average.

    No bins where scores are not between 0 and 1.
    """
    scores = [row["score"] for row in predictions]
    if not scores or min(scores) < 0 or max(scores) > 1:
        return {"ECE": None, "bins": []}
    found = plain.calibration(n_bins=BINS, iou_threshold=0.5)
    return {
        "ECE": float(found["ece"]) if found["num_detections"] else None,  # all may lie on crowds
        "bins": [
            {
                "from": part["bin_lower"],
                "to": part["bin_upper"],
                "predictions": part["count"],
                "score": part["avg_confidence"] if part["count"] else None,
                "right": part["avg_accuracy"] if part["count"] else None,
            }
            for part in found["bins"]
        ],
    }


def best_of_each(predictions: list[dict], count: int) -> list[dict]:
    """The `count` predictions of the best score in each image, in their order; the first of those that are equal."""
    if not predictions:
        return []
    image = np.array([row["image_id"] for row in predictions])
    order = np.lexsort((-np.array([row["score"] for row in predictions]), image))
    starts = np.searchsorted(image[order], image[order])
    kept = np.sort(order[np.arange(len(order)) - starts < count])
    return [predictions[row] for row in kept]
