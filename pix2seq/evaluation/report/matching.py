"""Which prediction found which object, and what is wrong with the others: computed once, read by everything else.

The kinds of errors are TIDE's (Bolya et al., 2020). hotcoco tells what correcting a kind would give, and how often
there is one; this tells which predictions they are.
"""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pix2seq.evaluation.coco_metrics import box_ious, evaluate_fast
from pix2seq.progress import progress

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
IOUS = np.linspace(0.5, 0.95, 10)
EVERY_AREA = {"all": (0.0, 1e10)}
AT_ONCE = 100  # images: what hotcoco tells of a prediction takes kilobytes


@dataclass
class Matches:
    """pycocotools' matching of P predictions with G objects, sorted by class, then by score, best first.

    row, image, label (P,)     index in the list of predictions, of images and of classes; those in order of their id
    score (P,)
    found (10, P)              index of the object it is matched with, -1 where there is none
    ignored (10, P) bool       on a crowd, neither right nor wrong
    object_image (G,), object_label (G,)
    counted (G,) bool          whether the object is to be found: it is no crowd
    """

    row: np.ndarray
    image: np.ndarray
    label: np.ndarray
    score: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    object_image: np.ndarray
    object_label: np.ndarray
    counted: np.ndarray
    num_images: int
    num_classes: int

    @cached_property
    def right(self) -> np.ndarray:
        """(10, P) bool: the true positives."""
        return (self.found >= 0) & ~self.ignored


def match(truth: dict, predictions: list[dict]) -> Matches:
    """Both as `scoring.numbered` gives them. As in COCO, the best 100 predictions of a class in an image take part."""
    num_images, objects = len(truth["images"]), truth["annotations"]
    object_image = _column(objects, "image_id") - 1
    rows_of = _by_image(_column(predictions, "image_id") - 1, num_images)
    objects_of = _by_image(object_image, num_images)
    row, found, ignored = [np.zeros(0, int)], [np.zeros((len(IOUS), 0), int)], [np.zeros((len(IOUS), 0), bool)]
    gc.disable()  # there are no cycles in hotcoco's cells, and to look for them takes three times as long as the rest
    try:
        for first in progress(range(0, num_images, AT_ONCE), "matching"):
            part = slice(first, first + AT_ONCE)
            rows, present = np.concatenate(rows_of[part]), np.concatenate(objects_of[part])
            images = truth | {"images": truth["images"][part], "annotations": [objects[place] for place in present]}
            for cell in evaluate_fast(images, [predictions[place] for place in rows], EVERY_AREA).eval_imgs:
                if cell is not None and cell["dtIds"]:
                    row.append(rows[np.array(cell["dtIds"]) - 1])
                    found.append(np.array(cell["dtMatches"], int))
                    ignored.append(np.array(cell["dtIgnore"], bool))
    finally:
        gc.enable()
    row = np.concatenate(row)
    image, label, score = (
        _column((predictions[place] for place in row), key, kind)
        for key, kind in (("image_id", int), ("category_id", int), ("score", float))
    )
    order = np.lexsort((image, -score, label))
    return Matches(
        row=row[order],
        image=image[order] - 1,
        label=label[order] - 1,
        score=score[order],
        found=np.concatenate(found, axis=1)[:, order] - 1,
        ignored=np.concatenate(ignored, axis=1)[:, order],
        object_image=object_image,
        object_label=_column(objects, "category_id") - 1,
        counted=_column(objects, "iscrowd") == 0,
        num_images=num_images,
        num_classes=len(truth["categories"]),
    )


def _column(entries: Iterable[dict], key: str, kind: type = int) -> np.ndarray:
    return np.fromiter((entry[key] for entry in entries), kind)


def _by_image(images: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Which of the rows are of each image, in their order."""
    order = np.argsort(images, kind="stable")
    return np.split(order, np.searchsorted(images[order], np.arange(1, num_images)))


@dataclass(frozen=True, slots=True)
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
    predictions_of = _by_image(matches.image[judged], matches.num_images)
    objects_of = _by_image(matches.object_image[objects], matches.num_images)
    errors = []
    for rows, places in zip(predictions_of, objects_of, strict=True):
        found, present = judged[rows], objects[places]
        boxes = [predictions[row]["bbox"] for row in matches.row[found]]
        ious = box_ious(boxes, [truth["annotations"][index]["bbox"] for index in present])
        errors += _errors_of_image(matches, found, present, ious)
    wrong = [error for error in errors if error.prediction >= 0]
    missed = [error for error in errors if error.prediction < 0]
    wrong.sort(key=lambda error: -predictions[error.prediction]["score"])
    missed.sort(key=lambda error: -truth["annotations"][error.object]["area"])
    return wrong + missed


def _errors_of_image(matches: Matches, found: np.ndarray, present: np.ndarray, ious: np.ndarray) -> list[Error]:
    """`found` (p,) and `present` (g,) are an image's predictions and objects in `matches`; `ious` (p, g)."""
    found_as, right = matches.found[0, found], matches.right[0, found]
    wrong, taken = found[~right], np.isin(present, found_as[right])
    same = matches.label[wrong][:, None] == matches.object_label[present]
    kinds, places = _kinds(ious[~right], same, taken)
    named = np.isin(np.arange(len(present)), places[np.isin(kinds, ("classification", "localisation"))])
    about = np.where(places < 0, -1, np.append(present, -1)[places])
    missed = present[~taken & ~named]  # nor missing because of an error that has been named
    columns = kinds, matches.image[wrong], matches.row[wrong], about
    errors = [Error(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]
    return errors + [Error("missed", int(matches.object_image[index]), -1, int(index)) for index in missed]


def _kinds(ious: np.ndarray, same: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kinds of an image's wrong predictions (p,) and the places of the objects they are about, -1 for none, from
    their IoU with each object (p, g), whether that is of their class (p, g) and has been found by another (g,). The
    first kind that fits, in TIDE's order."""
    if not ious.size:
        return np.full(len(ious), "background"), np.full(len(ious), -1)
    own, other, found = ious * same, ious * ~same, ious * (same & taken)
    fits = {
        "localisation": (own.max(1) >= BACKGROUND) & (own.max(1) <= FOREGROUND),
        "classification": other.max(1) >= FOREGROUND,
        "duplicate": found.max(1) >= FOREGROUND,
        "background": ious.max(1) <= BACKGROUND,
    }
    places = own.argmax(1), other.argmax(1), found.argmax(1), -1
    conditions = list(fits.values())
    return np.select(conditions, list(fits), "both"), np.select(conditions, places, ious.argmax(1))


def without_crowds(truth: dict, predictions: list[dict], matches: Matches):
    """hotcoco's evaluation of both without crowds and what lies on them at IoU 0.5.

    COCO's AP passes over these; hotcoco's confusion matrix and error split take a prediction on a crowd for a false
    one.
    """
    objects = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    objects = [entry | {"id": number} for number, entry in enumerate(objects, start=1)]
    rows = np.sort(matches.row[~matches.ignored[0]])
    return evaluate_fast(truth | {"annotations": objects}, [predictions[row] for row in rows])


def operating_point(matches: Matches) -> dict[str, float] | None:
    """The score from which on predictions, of all classes, have the best F1 at IoU 0.5; its precision and recall. None
    where none is right."""
    judged = ~matches.ignored[0]
    order = np.argsort(-matches.score[judged], kind="stable")
    score, right = matches.score[judged][order], matches.right[0, judged][order]
    if not right.any():
        return None
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
