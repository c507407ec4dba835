"""Matches between predictions and objects, as in pycocotools, and the types of errors of TIDE (Bolya et al., 2020).

hotcoco counts the errors of each type. This module finds them, so that the report can show examples.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import hotcoco
import numpy as np

from pix2seq.evaluation.coco_metrics import box_ious, evaluate_with_hotcoco

# Types of errors in the order of TIDE's figures, with hotcoco's names.
ERROR_TYPES = {
    "classification": "Cls",
    "localization": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1  # TIDE's thresholds
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
UNMATCHED, IGNORED = -1, -2


@dataclass
class Matches:
    """Matches of P predictions with G objects at the 10 IoU thresholds of COCO.

    Args:
        object_index: int (10, P), the index of the object that each prediction is matched with, UNMATCHED if there is
            none, or IGNORED: the prediction is on a crowd, or is not one of the best 100 of its image and class.
        image: int (P,), image index of each prediction, in the order of the image ids.
        label: int (P,), label of each prediction, in the order of the category ids.
        score: float (P,).
        object_image: int (G,).
        object_label: int (G,).
        is_crowd: bool (G,).
        num_images: Number of images.
        num_classes: Number of classes.
    """

    object_index: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray
    is_crowd: np.ndarray
    num_images: int
    num_classes: int

    @property
    def correct(self) -> np.ndarray:
        """bool (10, P), the true positives."""
        return self.object_index >= 0

    @property
    def ignored(self) -> np.ndarray:
        """bool (10, P), the predictions that are neither right nor wrong."""
        return self.object_index == IGNORED


def match(ground_truth: dict, predictions: list[dict], evaluation: hotcoco.COCOeval | None = None) -> Matches:
    """Matches predictions with objects.

    Args:
        ground_truth: COCO annotations from `remap_ids`.
        predictions: Predictions from `remap_ids`.
        evaluation: hotcoco's evaluation of both, if there is one.
    """
    evaluation = evaluation or evaluate_with_hotcoco(ground_truth, predictions)
    object_index = np.full((len(IOU_THRESHOLDS), len(predictions)), IGNORED)
    for row, iou in zip(object_index, IOU_THRESHOLDS, strict=True):
        found = evaluation.image_diagnostics(iou_thr=float(iou))
        row[_to_indices(found["dt_status"].keys())] = UNMATCHED
        row[_to_indices(found["dt_match"].keys())] = _to_indices(found["dt_match"].values())
    annotations = ground_truth["annotations"]
    return Matches(
        object_index=object_index,
        image=_to_indices(entry["image_id"] for entry in predictions),
        label=_to_indices(entry["category_id"] for entry in predictions),
        score=np.array([entry["score"] for entry in predictions], float),
        object_image=_to_indices(entry["image_id"] for entry in annotations),
        object_label=_to_indices(entry["category_id"] for entry in annotations),
        is_crowd=np.array([entry["iscrowd"] for entry in annotations], bool),
        num_images=len(ground_truth["images"]),
        num_classes=len(ground_truth["categories"]),
    )


def _to_indices(ids: Iterable[int]) -> np.ndarray:
    return np.fromiter(ids, int) - 1


@dataclass(frozen=True, slots=True)
class Error:
    """A wrong prediction, the object it is compared with, or both.

    Args:
        type: One of `ERROR_TYPES`.
        image: Image index.
        prediction: Index of the prediction, None for a missed object.
        object: Index of the object, None for a prediction on the background.
    """

    type: str
    image: int
    prediction: int | None
    object: int | None


def find_errors(ground_truth: dict, predictions: list[dict], matches: Matches) -> list[Error]:
    """Finds all errors at IoU 0.5.

    Args:
        ground_truth: COCO annotations from `remap_ids`.
        predictions: Predictions from `remap_ids`.
        matches: Result of `match`.

    Returns:
        The wrong predictions, highest score first, then the missed objects, largest first.
    """
    counted = np.flatnonzero(~matches.ignored[0])
    counted = counted[np.argsort(-matches.score[counted], kind="stable")]
    objects = np.flatnonzero(~matches.is_crowd)
    errors = []
    for image, (rows, columns) in enumerate(
        zip(
            _split_by_image(counted, matches.image[counted], matches.num_images),
            _split_by_image(objects, matches.object_image[objects], matches.num_images),
            strict=True,
        )
    ):
        ious = box_ious(
            [predictions[row]["bbox"] for row in rows],
            [ground_truth["annotations"][column]["bbox"] for column in columns],
        )
        errors += _find_errors_of_image(image, rows, columns, ious, matches)

    def rank(error: Error) -> tuple[bool, float]:
        if error.prediction is None:
            return True, -ground_truth["annotations"][error.object]["area"]
        return False, -predictions[error.prediction]["score"]

    return sorted(errors, key=rank)


def _split_by_image(indices: np.ndarray, images: np.ndarray, num_images: int) -> list[np.ndarray]:
    order = np.argsort(images, kind="stable")
    return np.split(indices[order], np.searchsorted(images[order], np.arange(1, num_images)))


def _find_errors_of_image(
    image: int, rows: np.ndarray, columns: np.ndarray, ious: np.ndarray, matches: Matches
) -> list[Error]:
    """Finds the errors of one image, given the IoU (p, g) of its predictions `rows` and its objects `columns`."""
    matched = matches.object_index[0, rows]
    wrong = matched == UNMATCHED
    is_found = np.isin(columns, matched)
    same_class = matches.label[rows[wrong]][:, None] == matches.object_label[columns]
    errors, explained = [], set()
    for row, (error_type, column) in zip(
        rows[wrong].tolist(), _classify(ious[wrong], same_class, is_found), strict=True
    ):
        errors.append(Error(error_type, image, row, None if column is None else int(columns[column])))
        if error_type in ("classification", "localization"):
            explained.add(column)
    missed = [int(columns[i]) for i in np.flatnonzero(~is_found) if i not in explained]
    return errors + [Error("missed", image, None, index) for index in missed]


def _classify(ious: np.ndarray, same_class: np.ndarray, is_found: np.ndarray) -> list[tuple[str, int | None]]:
    """Returns the type of each wrong prediction and the object it is compared with: the first type that fits.

    Args:
        ious: (p, g), IoU of predictions and objects.
        same_class: bool (p, g), whether the classes are equal.
        is_found: bool (g,), whether another prediction is matched with the object.
    """
    if not ious.size:
        return [("background", None)] * len(ious)
    own, other, duplicate = ious * same_class, ious * ~same_class, ious * (same_class & is_found)
    conditions = {
        "localization": (own.max(1) >= BACKGROUND_IOU) & (own.max(1) <= FOREGROUND_IOU),
        "classification": other.max(1) >= FOREGROUND_IOU,
        "duplicate": duplicate.max(1) >= FOREGROUND_IOU,
        "background": ious.max(1) <= BACKGROUND_IOU,
    }
    columns = [own.argmax(1), other.argmax(1), duplicate.argmax(1), -1]
    types = np.select(list(conditions.values()), list(conditions), "both").tolist()
    columns = np.select(list(conditions.values()), columns, ious.argmax(1)).tolist()
    return [(name, None if name == "background" else column) for name, column in zip(types, columns, strict=True)]


def remove_crowds(ground_truth: dict, predictions: list[dict], matches: Matches) -> tuple[dict, list[dict]]:
    """Removes crowds and the predictions that COCO ignores.

    COCO's AP ignores predictions on crowds. hotcoco's error types, confusion matrix and calibration count them as
    wrong.
    """
    annotations = [annotation for annotation in ground_truth["annotations"] if not annotation["iscrowd"]]
    annotations = [annotation | {"id": number} for number, annotation in enumerate(annotations, start=1)]
    kept = [predictions[row] for row in np.flatnonzero(~matches.ignored[0])]
    return ground_truth | {"annotations": annotations}, kept


def best_threshold(matches: Matches) -> dict[str, float] | None:
    """Finds the score threshold with the best F1 over all classes at IoU 0.5.

    Returns:
        "score", "precision", "recall" and "F1" at this threshold, None if no prediction is right.
    """
    counted = np.flatnonzero(~matches.ignored[0])
    counted = counted[np.argsort(-matches.score[counted], kind="stable")]
    score, correct = matches.score[counted], matches.correct[0, counted]
    if not correct.any():
        return None
    num_objects = (~matches.is_crowd).sum()
    num_correct, num_predicted = np.cumsum(correct), np.arange(1, len(correct) + 1)
    is_last = np.append(score[1:] < score[:-1], True)  # a threshold includes all predictions of equal score
    f1 = np.where(is_last, 2 * num_correct / (num_predicted + num_objects), -1)
    best = int(f1.argmax())
    return {
        "score": float(score[best]),
        "precision": float(num_correct[best] / num_predicted[best]),
        "recall": float(num_correct[best] / num_objects),
        "F1": float(f1[best]),
    }
