"""Which prediction found which object, at each of COCO's IoU thresholds: computed once, read by everything else."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pix2seq.scoring import evaluate_fast

IOUS = np.linspace(0.5, 0.95, 10)
EVERY_AREA = {"all": (0.0, 1e10)}


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
    cells = [cell for cell in evaluate_fast(truth, predictions, EVERY_AREA).eval_imgs if cell is not None]

    def joined(key: str, dtype) -> np.ndarray:
        rows = [np.array(cell[key], dtype).reshape(len(IOUS), -1) for cell in cells]
        return np.concatenate([np.zeros((len(IOUS), 0), dtype), *rows], axis=1)

    row = np.array([number for cell in cells for number in cell["dtIds"]], int) - 1
    image = np.array([predictions[index]["image_id"] for index in row], int) - 1
    label = np.array([predictions[index]["category_id"] for index in row], int) - 1
    score = np.array([predictions[index]["score"] for index in row], float)
    order = np.lexsort((image, -score, label))
    objects = truth["annotations"]
    return Matches(
        row=row[order],
        image=image[order],
        label=label[order],
        score=score[order],
        found=joined("dtMatches", int)[:, order] - 1,
        ignored=joined("dtIgnore", bool)[:, order],
        object_image=np.array([entry["image_id"] for entry in objects], int) - 1,
        object_label=np.array([entry["category_id"] for entry in objects], int) - 1,
        counted=np.array([not entry["iscrowd"] for entry in objects], bool),
        num_images=len(truth["images"]),
        num_classes=len(truth["categories"]),
    )
