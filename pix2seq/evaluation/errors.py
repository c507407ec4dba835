"""What is wrong with each prediction, after TIDE (Bolya et al., 2020): one kind for each error.

hotcoco tells what correcting a kind would give, and how often there is one; this tells which predictions they are.
"""

from dataclasses import dataclass

import numpy as np

from pix2seq.evaluation.matches import Matches
from pix2seq.scoring import box_ious, evaluate_fast

# In the order of TIDE's figures; hotcoco's names of them.
KINDS = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU from which a box is on an object, and up to which it is on none


@dataclass(frozen=True)
class Error:
    """A wrong prediction, the object it is wrong about, or both: indices into the lists of both, -1 where none."""

    kind: str
    image: int
    prediction: int
    object: int


def find_errors(truth: dict, predictions: list[dict], matches: Matches) -> list[Error]:
    """Every error at IoU 0.5: those of predictions, best score first; then the missed objects, largest first."""
    judged = np.flatnonzero(~matches.ignored[0])
    judged = judged[np.lexsort((matches.row[judged], -matches.score[judged]))]
    objects = np.flatnonzero(matches.counted)
    predictions_of = _by_image(judged, matches.image[judged], matches.num_images)
    objects_of = _by_image(objects, matches.object_image[objects], matches.num_images)
    errors = []
    for found, present in zip(predictions_of, objects_of, strict=True):
        boxes = [predictions[row]["bbox"] for row in matches.row[found]]
        ious = box_ious(boxes, [truth["annotations"][index]["bbox"] for index in present])
        errors += _errors_of_image(matches, found, present, ious)
    wrong = [error for error in errors if error.prediction >= 0]
    missed = [error for error in errors if error.prediction < 0]
    wrong.sort(key=lambda error: -predictions[error.prediction]["score"])
    missed.sort(key=lambda error: -truth["annotations"][error.object]["area"])
    return wrong + missed


def _by_image(indices: np.ndarray, images: np.ndarray, num_images: int) -> list[np.ndarray]:
    order = np.argsort(images, kind="stable")
    return np.split(indices[order], np.searchsorted(images[order], np.arange(1, num_images)))


def _errors_of_image(matches: Matches, found: np.ndarray, present: np.ndarray, ious: np.ndarray) -> list[Error]:
    """`found` (p,) and `present` (g,) are an image's predictions and objects in `matches`; `ious` (p, g)."""
    found_as, right = matches.found[0, found], matches.right[0, found]
    taken = np.isin(present, found_as[right])
    same = matches.label[found][:, None] == matches.object_label[present]
    errors, correctable = [], np.zeros(len(present), bool)
    for number in np.flatnonzero(~right):
        kind, place = _kind(ious[number], same[number], taken)
        if kind in ("classification", "localisation"):
            correctable[place] = True  # the object is missing because of an error that has been named
        index, about = found[number], -1 if place < 0 else int(present[place])
        errors.append(Error(kind, int(matches.image[index]), int(matches.row[index]), about))
    missed = present[~taken & ~correctable]
    return errors + [Error("missed", int(matches.object_image[index]), -1, int(index)) for index in missed]


def _kind(ious: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[str, int]:
    """The kind of a wrong prediction and the place of the object it is about, from its IoU with each object (g,),
    whether that is of its class (g,) and has been found by another (g,). The first kind that fits, in TIDE's order."""
    if not ious.size:
        return "background", -1
    own, other, found = ious * same, ious * ~same, ious * (same & taken)
    if BACKGROUND <= own.max() <= FOREGROUND:
        return "localisation", int(own.argmax())
    if other.max() >= FOREGROUND:
        return "classification", int(other.argmax())
    if found.max() >= FOREGROUND:
        return "duplicate", int(found.argmax())
    if ious.max() <= BACKGROUND:
        return "background", -1
    return "both", int(ious.argmax())


def without_crowds(truth: dict, predictions: list[dict], matches: Matches):
    """hotcoco's evaluation of both without crowds and what lies on them at IoU 0.5.

    COCO's AP passes over these; hotcoco's confusion matrix and error split take a prediction on a crowd for a false
    one.
    """
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    objects = [entry | {"id": number} for number, entry in enumerate(objects, start=1)]
    rows = np.sort(matches.row[~matches.ignored[0]])
    return evaluate_fast(truth | {"annotations": objects}, [predictions[row] for row in rows])


def operating_point(matches: Matches) -> dict[str, float]:
    """The score from which on predictions, of all classes, have the best F1 at IoU 0.5; its precision and recall."""
    judged = ~matches.ignored[0]
    order = np.argsort(-matches.score[judged], kind="stable")
    score, right = matches.score[judged][order], matches.right[0, judged][order]
    if not right.any():
        return {"score": 0.0, "precision": 0.0, "recall": 0.0, "F1": 0.0}
    hits, seen = np.cumsum(right), np.arange(1, len(right) + 1)
    last = np.append(score[1:] < score[:-1], True)  # a threshold takes all predictions of the same score
    f1 = np.where(last, 2 * hits / (seen + matches.counted.sum()), -1)
    best = int(f1.argmax())
    return {
        "score": float(score[best]),
        "precision": float(hits[best] / seen[best]),
        "recall": float(hits[best] / matches.counted.sum()),
        "F1": float(f1[best]),
    }
