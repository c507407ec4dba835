"""Images of predictions beside the ground truth: the first images of a dataset, and the worst."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from pix2seq.data import Annotations
from pix2seq.data.image_files import BadImageError
from pix2seq.evaluation.coco_metrics import box_ious
from pix2seq.visualization import (
    CELL,
    CORRECT,
    GREY,
    WRONG,
    color_of,
    draw_boxes,
    enlarge,
    grid,
    paragraph,
    side_by_side,
)

MIN_SCORE = 0.3  # of the predictions that are drawn
MIN_IOU = 0.5  # from which a prediction is on an object
COLUMNS = 2  # images in a row
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


@dataclass(frozen=True)
class ImageErrors:
    """Errors in an image with N objects and M predictions with a score of at least 0.3.

    Args:
        index: Index of the image.
        predictions: The predictions, without those on crowds.
        is_found: bool (N,), whether a prediction of the same class has an IoU of at least 0.5 with the object.
        is_correct: bool (M,), whether the prediction is on an object of its class. Duplicates are correct.
        has_predictions: Whether any prediction has a score of at least 0.3, those on crowds included.
    """

    index: int
    predictions: list[dict]
    is_found: np.ndarray
    is_correct: np.ndarray
    has_predictions: bool

    @property
    def agreement(self) -> float:
        """Found objects as a fraction of all objects and wrong predictions, 1 if there are none."""
        total = len(self.is_found) + (~self.is_correct).sum()
        return float(self.is_found.sum() / total) if total else 1.0

    @property
    def highest_wrong_score(self) -> float:
        """The highest score of a wrong prediction, 0 if there is none."""
        scores = np.array([prediction["score"] for prediction in self.predictions], float)
        return float(scores[~self.is_correct].max(initial=0.0))


def find_worst(annotations: Annotations, predictions: list[dict], count: int) -> list[ImageErrors]:
    """Finds the images with the largest errors.

    Half of them are those of lowest `agreement`, the others those of the `highest_wrong_score`. Crowds are neither
    found nor missed, and predictions on them neither correct nor wrong, as in COCO.

    Args:
        annotations: The ground truth.
        predictions: COCO results.
        count: Maximum number of images. Images without errors are never returned.
    """
    by_image = _group_by_image(predictions)
    images = [
        _find_errors(annotations, index, by_image.get(image_id, []))
        for index, image_id in enumerate(annotations.image_ids.tolist())
        if index not in annotations.bad_images
    ]
    by_agreement = sorted(
        (image for image in images if image.agreement < 1), key=lambda image: (image.agreement, -len(image.is_found))
    )
    by_score = sorted(
        (image for image in by_agreement if image.highest_wrong_score), key=lambda image: -image.highest_wrong_score
    )
    in_order = [*by_agreement[: (count + 1) // 2], *by_score, *by_agreement]
    return list({image.index: image for image in in_order}.values())[:count]


def _find_errors(annotations: Annotations, index: int, predictions: list[dict]) -> ImageErrors:
    boxes, labels = annotations.objects(index)
    of_image = slice(annotations.offsets[index], annotations.offsets[index + 1])
    crowd = annotations.crowd[of_image]
    crowd_boxes, crowd_labels = annotations.boxes[of_image][crowd], annotations.labels[of_image][crowd]
    on_crowd = _is_on(annotations, predictions, crowd_boxes, crowd_labels, crowd=True).any(axis=1)
    on_object = _is_on(annotations, predictions, boxes, labels)
    counted = on_object.any(axis=1) | ~on_crowd
    on_object = on_object[counted]  # (M, N)
    return ImageErrors(
        index=index,
        predictions=[prediction for prediction, count in zip(predictions, counted, strict=True) if count],
        is_found=np.any(on_object, axis=0),
        is_correct=np.any(on_object, axis=1),
        has_predictions=bool(predictions),
    )


def _is_on(
    annotations: Annotations, predictions: list[dict], boxes: np.ndarray, labels: np.ndarray, crowd: bool = False
) -> np.ndarray:
    """Whether each prediction is on each object (boxes (N, 4) xyxy) and of its class: bool (M, N)."""
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    target_ids = np.array(annotations.categories.ids)[labels]
    predicted_ids = np.array([prediction["category_id"] for prediction in predictions], int)
    ious = box_ious([prediction["bbox"] for prediction in predictions], boxes, crowd)
    return (predicted_ids[:, None] == target_ids) & (ious >= MIN_IOU)


def worst_image(annotations: Annotations, predictions: list[dict], count: int) -> Image.Image:
    """Draws the ground truth (left) and the predictions (right) of the images that `find_worst` returns.

    Only these images are read. Those that cannot be read are gray.
    """
    worst = find_worst(annotations, predictions, count)
    if not worst:
        text = f"All objects are found, and no prediction with a score of at least {MIN_SCORE} is wrong."
        return paragraph(text, 2 * CELL)
    pairs = [_draw_errors(annotations, errors) for errors in worst]
    rows = [pairs[start : start + COLUMNS] for start in range(0, len(pairs), COLUMNS)]
    return grid(
        [[image for images, _ in row for image in images] for row in rows],
        ["ground truth (orange: missed)", f"{TITLE} (orange: wrong)"] * min(COLUMNS, len(pairs)),
        CELL,
        [[caption for _, captions in row for caption in captions] for row in rows],
    )


def _draw_errors(annotations: Annotations, errors: ImageErrors) -> tuple[list[Image.Image], list[str]]:
    """Returns the two images and their captions."""
    name_of = dict(zip(annotations.categories.ids, annotations.categories.names, strict=True))
    boxes, labels = annotations.objects(errors.index)
    names = [annotations.categories.names[label] for label in labels]
    predicted = [f"{name_of[p['category_id']]} {p['score']:.2f}" for p in errors.predictions]
    wrong = [name for name, is_correct in zip(predicted, errors.is_correct, strict=True) if not is_correct]
    captions = [
        f"image {annotations.image_ids[errors.index]}: {errors.is_found.sum()} of {len(names)} found",
        f"{len(wrong)} wrong, highest score: {wrong[0]}"
        if wrong
        else "none wrong"
        if errors.has_predictions
        else NO_PREDICTIONS,
    ]
    image = _read_image(annotations, errors.index)
    if image is None:
        return [_unreadable_image()] * 2, [f"{captions[0]} (cannot be read)", captions[1]]
    return [
        _draw_marked(image, boxes, names, errors.is_found),
        _draw_marked(image, _to_xyxy(errors.predictions), predicted, errors.is_correct),
    ], captions


def _draw_marked(image: Image.Image, boxes: np.ndarray, names: list[str], is_correct: np.ndarray) -> Image.Image:
    """Draws errors last, over the other boxes."""
    order = np.argsort(~is_correct, kind="stable")
    colors = [CORRECT if is_correct[index] else WRONG for index in order]
    return _draw(image, boxes[order], [names[index] for index in order], colors)


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
