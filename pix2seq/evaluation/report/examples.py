"""Example images of each type of error."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation.report.analysis import Analysis
from pix2seq.evaluation.report.matching import ERROR_TYPES, Error
from pix2seq.visualization import CELL, CORRECT, WRONG, draw_boxes, enlarge, grid

MIN_SCORE = 0.05  # of wrong predictions
MAX_EXAMPLES = 4  # of a type of error, each in another image
CONTEXT = 2.5  # side of the drawn part of the image, in sides of the boxes
MIN_SIDE = 64  # pixels of the drawn part


def example_images(analysis: Analysis, annotations: Annotations) -> dict[str, Image.Image]:
    """Draws a row of examples for each type of error: the highest scores, and the largest missed objects.

    Images that cannot be read are skipped. Types without examples are left out.
    """
    order = np.argsort(annotations.image_ids)  # the analysis sorts the images by id
    rows = {}
    for error_type in ERROR_TYPES:
        images = list(islice(_examples(error_type, analysis, annotations, order), MAX_EXAMPLES))
        if images:
            padding = [Image.new("RGB", (1, 1), "white")] * (MAX_EXAMPLES - len(images))
            rows[error_type] = grid([images + padding], cell=CELL)
    return rows


def _examples(
    error_type: str, analysis: Analysis, annotations: Annotations, order: np.ndarray
) -> Iterator[Image.Image]:
    used = set()
    for error in analysis.errors:
        if error.type != error_type or error.image in used:
            continue
        if error.prediction is not None and analysis.predictions[error.prediction]["score"] < MIN_SCORE:
            return
        used.add(error.image)
        try:
            image = to_pil_image(annotations.image_file(int(order[error.image])).pixels())
        except BadImageError:
            continue
        yield draw_error(image, error, analysis)


def draw_error(image: Image.Image, error: Error, analysis: Analysis) -> Image.Image:
    """Draws the part of an image around an error: the object in CORRECT (or missed), the wrong prediction in WRONG."""
    names = [row["name"] for row in analysis.numbers["classes"]]
    target = predicted = None
    if error.object is not None:
        target = analysis.ground_truth["annotations"][error.object]
    if error.prediction is not None:
        predicted = analysis.predictions[error.prediction]
    boxes = np.array([entry["bbox"] for entry in (target, predicted) if entry is not None], float)
    boxes[:, 2:] += boxes[:, :2]
    area = _crop_around(boxes, image.size)
    image, boxes = enlarge(image.crop(area), boxes - np.array([*area[:2], *area[:2]]), CELL)
    if target is not None and predicted is not None:
        # Equal boxes and names stay visible: a thin box on a thick one, one name above and one below.
        image = draw_boxes(image, boxes[:1], [""], [CORRECT], width=6)
    if predicted is not None:
        text = f"predicted: {names[predicted['category_id'] - 1]} {predicted['score']:.2f}"
        image = draw_boxes(image, boxes[-1:], [text], [WRONG], font_size=14, width=3, names_below=True)
    if target is not None:
        name, missed = names[target["category_id"] - 1], predicted is None
        text, color, width = (f"missed: {name}", WRONG, 3) if missed else (f"target: {name}", CORRECT, 0)
        image = draw_boxes(image, boxes[:1], [text], [color], font_size=14, width=width, names_below=missed)
    return image


def _crop_around(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the part (x1, y1, x2, y2) of an image of size (width, height) around boxes (N, 4) xyxy."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    extent = np.minimum(max(CONTEXT * (high - low).max(), MIN_SIDE), size)
    start = np.clip((low + high - extent) / 2, 0, size - extent).astype(int)
    end = np.maximum(start + 1, np.round(start + extent).astype(int))
    return (*start.tolist(), *end.tolist())
