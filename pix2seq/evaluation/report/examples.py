"""Pictures of errors: the truth in one colour, the box that is wrong in another, both with words."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation.report.analysis import Analysis
from pix2seq.evaluation.report.matching import KINDS, Error
from pix2seq.visualization import CELL, PALETTE, draw_boxes, enlarge, grid

TRUTH, WRONG = PALETTE[1], PALETTE[0]  # sky blue and orange: names in black are legible on both
LEAST_SCORE = 0.05  # of a wrong prediction that is shown: a detector may write any number of boxes it does not believe
COUNT = 4  # pictures of a kind, each of another image
CONTEXT = 2.5  # side of what is shown around small boxes, in sides of them


def example_images(analysis: Analysis, annotations: Annotations) -> dict[str, Image.Image]:
    """A row of pictures for each kind of error there is: the surest predictions, and the largest missed objects.

    Images that cannot be read are passed over; a kind without a picture is left out.
    """
    order = np.argsort(annotations.image_ids)  # the analysis has them in the order of their ids
    pictures = {}
    for kind in KINDS:
        drawn = list(islice(_drawn(kind, analysis, annotations, order), COUNT))
        if drawn:
            empty = [Image.new("RGB", (1, 1), "white")] * (COUNT - len(drawn))
            pictures[kind] = grid([drawn + empty], cell=CELL)
    return pictures


def _drawn(kind: str, analysis: Analysis, annotations: Annotations, order: np.ndarray) -> Iterator[Image.Image]:
    seen = set()
    for error in analysis.errors:
        if error.kind != kind or error.image in seen:
            continue
        if error.prediction >= 0 and analysis.predictions[error.prediction]["score"] < LEAST_SCORE:
            return
        seen.add(error.image)
        try:
            image = to_pil_image(annotations.image_file(int(order[error.image])).pixels())
        except BadImageError:
            continue
        yield draw_error(image, error, analysis)


def draw_error(image: Image.Image, error: Error, analysis: Analysis) -> Image.Image:
    """The part of the image around the error, `CELL` pixels on its longer side."""
    boxes, names, wrong = _boxes(error, analysis)
    area = _around(boxes, image.size)
    boxes = boxes - np.array([*area[:2], *area[:2]])
    large, boxes = enlarge(image.crop(area), boxes, CELL)
    # Where both boxes are the same, the thin one lies on the thick one, and the names do not lie on each other.
    truth, bad = ([row for row, is_wrong in enumerate(wrong) if is_wrong == which] for which in (False, True))
    for rows, color, width in ((truth, TRUTH, 6), (bad, WRONG, 3), (truth, TRUTH, 0)):
        shown = [names[row] if width != 6 else "" for row in rows]
        large = draw_boxes(large, boxes[rows], shown, [color] * len(rows), None, 14, width, names_below=rows is bad)
    return large


def _boxes(error: Error, analysis: Analysis) -> tuple[np.ndarray, list[str], list[bool]]:
    """Boxes (n, 4) xyxy in pixels, what is written on them, and whether each is the wrong one."""
    class_names = [entry["name"] for entry in analysis.numbers["classes"]]
    shown = []
    if error.object >= 0:
        entry = analysis.truth["annotations"][error.object]
        missed = error.prediction < 0
        name = class_names[entry["category_id"] - 1]
        shown.append((entry["bbox"], f"missed: {name}" if missed else f"truth: {name}", missed))
    if error.prediction >= 0:
        row = analysis.predictions[error.prediction]
        shown.append((row["bbox"], f"said: {class_names[row['category_id'] - 1]} {row['score']:.2f}", True))
    boxes = np.array([box for box, *_ in shown], float)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, [name for _, name, _ in shown], [wrong for *_, wrong in shown]


def _around(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A part of an image (width, height) with all boxes, xyxy: the whole where they are not small in it."""
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = max(CONTEXT * max(right - left, bottom - top), 64)
    lows, highs = [], []
    for low, high, length in ((left, right, size[0]), (top, bottom, size[1])):
        extent = min(side, length)
        start = min(max((low + high - extent) / 2, 0), length - extent)
        lows.append(int(start))
        highs.append(max(int(start) + 1, round(start + extent)))
    return (*lows, *highs)
