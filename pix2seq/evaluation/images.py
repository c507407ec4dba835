"""Images of predictions beside the ground truth."""

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.visualization import CELL, GREY, color_of, draw_boxes, enlarge, side_by_side

MIN_SCORE = 0.3  # of the predictions that are drawn
TITLE, NO_PREDICTIONS = f"predictions with score >= {MIN_SCORE}", f"no score >= {MIN_SCORE}"


def prediction_image(annotations: Annotations, predictions: list[dict], count: int) -> Image.Image:
    """Draws the ground truth (left) and the predictions (right) of the first images.

    Args:
        annotations: The ground truth. Images that cannot be read are gray.
        predictions: COCO results. Those with a score below 0.3 are not drawn.
        count: Number of images.
    """
    names = annotations.categories.names
    label_of_category = {category_id: label for label, category_id in enumerate(annotations.categories.ids)}
    by_image = _group_by_image(predictions)
    pairs = []
    for index in range(min(count, len(annotations))):
        drawn = by_image.get(int(annotations.image_ids[index]), [])
        boxes, labels = annotations.objects(index)
        image, no_boxes = _read_image(annotations, index), NO_PREDICTIONS
        if image is None:
            image, no_boxes, boxes, labels = _unreadable_image(), "cannot be read", boxes[:0], labels[:0]
        predicted_labels = [label_of_category[prediction["category_id"]] for prediction in drawn]
        captions = [f"{names[k]} {p['score']:.2f}" for k, p in zip(predicted_labels, drawn, strict=True)]
        target = _draw(image, boxes, [names[label] for label in labels], [color_of(label) for label in labels])
        predicted = _draw(image, _to_xyxy(drawn), captions, [color_of(label) for label in predicted_labels])
        if not drawn:
            predicted = draw_boxes(predicted, np.zeros((1, 4)), [no_boxes], ["white"], width=0)
        pairs.append((target, predicted))
    return side_by_side(pairs, title=TITLE)


def _draw(image: Image.Image, boxes: np.ndarray, names: list[str], colors: list[str]) -> Image.Image:
    return draw_boxes(*enlarge(image, boxes, CELL), names, colors)


def _group_by_image(predictions: list[dict]) -> dict[int, list[dict]]:
    """Groups the predictions that are drawn by image id."""
    by_image: dict[int, list[dict]] = {}
    for prediction in predictions:
        if prediction["score"] >= MIN_SCORE:
            by_image.setdefault(prediction["image_id"], []).append(prediction)
    return by_image


def _to_xyxy(predictions: list[dict]) -> np.ndarray:
    boxes = np.array([prediction["bbox"] for prediction in predictions], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _read_image(annotations: Annotations, index: int) -> Image.Image | None:
    """Reads an image, None if it cannot be read."""
    try:
        return to_pil_image(annotations.image_file(index).pixels())
    except BadImageError:
        return None


def _unreadable_image() -> Image.Image:
    return Image.new("RGB", (CELL, CELL), GREY)
