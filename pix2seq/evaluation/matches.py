"""Which prediction found which object, at each of COCO's IoU thresholds: computed once, read by everything else."""

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pix2seq.progress import progress
from pix2seq.scoring import evaluate_fast

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
